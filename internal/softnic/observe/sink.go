package observe

import (
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/ringside-rdma/ringside/internal/pcap"
)

// A FileSink writes packets as pcapng: each address of each NIC is an interface. The files are open, and stay the caller's.
type FileSink struct {
	Files    *pcap.Files
	Renderer Renderer

	places map[place]int // their interfaces
	counts []uint64      // packets of each
	pkt    pcap.Packet
}

// place is where packets are seen.
type place struct {
	nic   *Source
	local netip.Addr
	path  Path
}

// Name is what the NIC is called, beside others of the same host.
func (s *Source) Name() string { return fmt.Sprintf("soft0/%d", s.PID) }

// Packet implements Sink.
func (f *FileSink) Packet(s *Seen) error {
	p := place{s.Source, s.Dst.Addr(), s.Path}
	if s.Out {
		p.local = s.Src.Addr()
	}
	if s.Path != UDP {
		p.local = netip.AddrFrom16(s.Source.GID)
	}
	i, ok := f.places[p]
	if !ok {
		var err error
		i, err = f.Files.AddInterface(pcap.Interface{Name: s.Source.Name() + "/" + p.path.String(),
			Description: fmt.Sprintf("%s, pid %d, GID %v, %s", s.Source.Program, s.Source.PID, s.Source.GID, through(p))})
		if err != nil {
			return err
		}
		if f.places == nil {
			f.places = map[place]int{}
		}
		f.places[p] = i
		f.counts = append(f.counts, 0)
	}
	f.counts[i]++
	k := &f.pkt
	k.Interface, k.Time, k.Lost, k.Direction = i, time.Unix(0, s.Time), s.Lost, pcap.In
	if s.Out {
		k.Direction = pcap.Out
	}
	k.Data, k.Length, k.Comment = f.Renderer.Render(&s.Record)
	return f.Files.Packet(k)
}

func through(p place) string {
	switch p.path {
	case Shm:
		return "through shared memory: packets as they would have been"
	case Inproc:
		return "within the process: packets as they would have been"
	}
	return "UDP at " + p.local.String()
}

// Flush implements Sink.
func (f *FileSink) Flush() error { return f.Files.Flush() }

// Finish implements Sink. What was lost is said of the first interface: which of the NIC's it was is not known.
func (f *FileSink) Finish(s *Source, lost uint64) error {
	first := -1
	for p, i := range f.places {
		if p.nic == s && (first < 0 || i < first) {
			first = i
		}
	}
	now := time.Now()
	for p, i := range f.places {
		if p.nic != s {
			continue
		}
		n, l := f.counts[i], uint64(0)
		if i == first {
			n, l = n+lost, lost
		}
		if err := f.Files.Statistics(i, now, n, l); err != nil {
			return err
		}
		delete(f.places, p)
	}
	return nil
}

// A TextSink writes a line for each packet.
type TextSink struct {
	W        io.Writer
	Renderer Renderer
}

// Packet implements Sink.
func (t *TextSink) Packet(s *Seen) error {
	_, _, comment := t.Renderer.Render(&s.Record)
	_, err := fmt.Fprintf(t.W, "%s %s\n", time.Unix(0, s.Time).Format("15:04:05.000000"), Line(&s.Record, s.Source.Name()+"/"+s.Path.String(), comment))
	return err
}

// Flush implements Sink.
func (t *TextSink) Flush() error { return nil }

// Finish implements Sink.
func (t *TextSink) Finish(*Source, uint64) error { return nil }
