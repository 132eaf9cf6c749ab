package perf

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var allowUnexported = cmp.AllowUnexported(hello{}, setup{}, ready{}, endpoint{}, qpAddr{}, stop{}, report{}, cpuTime{},
	wireError{}, mark{}, marked{})

func sampleEndpoint(n int) endpoint {
	e := endpoint{gid: ib.GID{0xfe, 0x80, 15: 1}, lid: 7, mtu: ib.MTU4096, udpPort: 4791, service: "127.0.0.1:9"}
	for i := range e.buffer {
		e.buffer[i] = byte(i)
	}
	for i := range n {
		e.qps = append(e.qps, qpAddr{ib.QPN(100 + i), ib.PSN(0xabcdef)})
	}
	return e
}

func sampleMessages() []message {
	spec := Spec{Op: OpWrite, Kind: BW, QPs: 2, Inline: InlineAuto}.WithDefaults()
	return []message{
		&hello{version: protoVersion, host: Host{Name: "a", OS: "linux", Arch: "amd64", Kernel: "6", CPU: "c", Cores: 2, GOMAXPROCS: 2,
			PollCPU: -1, Go: "go1", Version: "v0", Device: "soft0", Provider: "soft", Tier: "software NIC"}},
		&setup{spec: spec, endpoint: sampleEndpoint(2)},
		&setup{spec: Spec{Op: OpRPC, Kind: Rate}.WithDefaults()},
		&ready{endpoint: sampleEndpoint(1)},
		&mark{}, &marked{},
		&stop{messages: 1 << 40},
		&report{messages: 9, cpu: cpuTime{time.Second, time.Millisecond}, path: "shm", atomicSum: 77},
		&wireError{text: "no room"},
	}
}

func TestMessagesRoundTrip(t *testing.T) {
	buf := make([]byte, maxFrame)
	for _, m := range sampleMessages() {
		got, err := readMessage(bytes.NewReader(appendFrame(nil, m)), buf)
		if err != nil {
			t.Errorf("%v: %v", m.frame(), err)
			continue
		}
		if d := cmp.Diff(m, got, allowUnexported); d != "" {
			t.Errorf("%v changed on the way (-sent +got):\n%s", m.frame(), d)
		}
	}
}

type badFrame struct {
	name, want string // want is part of the reason
	frame      []byte
}

func badFrames() []badFrame {
	frame := func(typ frameType, payload []byte) []byte {
		b := binary.LittleEndian.AppendUint32(nil, uint32(len(payload)))
		b = binary.LittleEndian.AppendUint16(b, uint16(typ))
		return append(b, payload...)
	}
	payload := func(m message) []byte { return m.append(nil) }
	h := payload(sampleMessages()[0])
	edit := func(b []byte, at int, v ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], v)
		return b
	}
	ep := payload(&ready{endpoint: sampleEndpoint(1)})
	return []badFrame{
		{"garbage", "unknown frame", []byte("GET / HTTP/1.1\r\n\r\n")},
		{"other magic", "does not speak", frame(frameHello, edit(h, 0, 0xff))},
		{"newer version", "speaks version 9", frame(frameHello, edit(h, 4, 9))},
		{"truncated hello", "ends too early", frame(frameHello, h[:len(h)-1])},
		{"long hello", "left over", frame(frameHello, append(bytes.Clone(h), 0))},
		{"too long", "the limit is", append(binary.LittleEndian.AppendUint32(nil, maxFrame+1), 1, 0)},
		{"long string", "a string of", frame(frameError, []byte{0xff, 0xff})},
		{"bad spec", "unknown operation", frame(frameSetup, make([]byte, 300))},
		{"too few queue pairs", "offers 1 queue pairs", frame(frameSetup,
			payload(&setup{spec: Spec{Op: OpSend, Kind: BW, QPs: 2}.WithDefaults(), endpoint: sampleEndpoint(1)}))},
		{"bad MTU", "MTU code", frame(frameReady, edit(ep, 18, 99))},
		{"many queue pairs, no bytes", "ends too early", frame(frameReady, edit(ep, 18+1+2+24+2+len("127.0.0.1:9"), 0, 4))},
		{"too many queue pairs", "the limit is", frame(frameReady, edit(ep, 18+1+2+24+2+len("127.0.0.1:9"), 0xff, 0xff))},
		{"queue pair 0", "is not valid", frame(frameReady, edit(ep, len(ep)-8, 0, 0, 0, 0))},
		{"wide PSN", "is not valid", frame(frameReady, edit(ep, len(ep)-1, 1))},
	}
}

func TestMessagesRefused(t *testing.T) {
	for _, tt := range badFrames() {
		t.Run(tt.name, func(t *testing.T) {
			_, err := readMessage(bytes.NewReader(tt.frame), make([]byte, maxFrame))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v does not say %q", err, tt.want)
			}
		})
	}
}

func FuzzReadMessage(f *testing.F) {
	for _, m := range sampleMessages() {
		f.Add(appendFrame(nil, m))
	}
	for _, b := range badFrames() {
		f.Add(b.frame)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readMessage(bytes.NewReader(b), make([]byte, maxFrame))
		if err != nil {
			return
		}
		if s, ok := m.(*setup); ok {
			if err := s.spec.Validate(); err != nil {
				t.Fatalf("an invalid spec was accepted: %v", err)
			}
			if n := s.spec.regionSize(); s.spec.Op != OpRPC && (n <= 0 || n > maxRegion) {
				t.Fatalf("a region of %d bytes was accepted", n)
			}
		}
		// What was accepted has one encoding only.
		again := appendFrame(nil, m)
		if !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("%v: % x was read, % x is written", m.frame(), b, again)
		}
	})
}

func TestHelloExchange(t *testing.T) {
	type end struct {
		c    *control
		host Host
		err  error
	}
	pair := func(t *testing.T, play func(net.Conn)) end {
		a, b := tcpPair(t)
		go play(b)
		c, h, err := newControl(a, Host{Name: "me"})
		if c != nil {
			t.Cleanup(c.close)
		}
		return end{c, h, err}
	}
	t.Run("good", func(t *testing.T) {
		e := pair(t, func(b net.Conn) {
			c, _, err := newControl(b, Host{Name: "you"})
			if err != nil {
				t.Error(err)
				return
			}
			_ = c.send(&mark{})
			c.close()
		})
		if e.err != nil || e.host.Name != "you" {
			t.Fatalf("%+v, %v", e.host, e.err)
		}
		if _, err := expect[*mark](t.Context(), e.c, time.Minute); err != nil {
			t.Fatal(err)
		}
		if _, err := expect[*mark](t.Context(), e.c, time.Minute); !errors.Is(err, ErrPeerGone) {
			t.Fatalf("after the end: %v", err)
		}
	})
	t.Run("refused with a reason", func(t *testing.T) {
		e := pair(t, func(b net.Conn) {
			_, _ = b.Write(appendFrame(nil, &wireError{"busy"}))
			_, _ = io.Copy(io.Discard, b)
			b.Close()
		})
		var pe *PeerError
		if !errors.As(e.err, &pe) || pe.Text != "busy" {
			t.Fatalf("got %v", e.err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		e := pair(t, func(b net.Conn) {
			_, _ = io.ReadFull(b, make([]byte, frameHeader))
			b.(*net.TCPConn).CloseWrite()
		})
		if !errors.Is(e.err, ErrPeerGone) {
			t.Fatalf("got %v", e.err)
		}
	})
	t.Run("another protocol", func(t *testing.T) {
		said := make(chan string, 1)
		e := pair(t, func(b net.Conn) {
			_, _ = b.Write([]byte("SSH-2.0-OpenSSH_9.9\r\n"))
			var all []byte
			all, _ = io.ReadAll(b)
			said <- string(all)
		})
		if e.err == nil || !strings.Contains(e.err.Error(), "does not speak ringside's perf protocol") {
			t.Fatalf("got %v", e.err)
		}
		if s := <-said; !strings.Contains(s, "does not speak") {
			t.Errorf("the peer was told %q", s)
		}
	})
}

// tcpPair returns the two ends of a loopback connection.
func tcpPair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err = l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}
