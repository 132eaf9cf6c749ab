package softnic

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// tcpPair returns both ends of a TCP connection.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// shrink has the system keep as little as it does well with.
func shrink(conns ...*net.TCPConn) {
	for _, c := range conns {
		c.SetReadBuffer(64 << 10)
		c.SetWriteBuffer(32 << 10)
	}
}

// useStream takes e to INIT, with c.
func (e *end) useStream(c *net.TCPConn) {
	e.t.Helper()
	e.init()
	if err := e.q.(*QP).UseStream(c); err != nil {
		e.t.Fatal(err)
	}
}

// streamed connects two ends by a stream.
func streamed(t testing.TB, a, b *end) {
	t.Helper()
	c, d := tcpPair(t)
	a.useStream(c)
	b.useStream(d)
	a.connect(b)
	b.connect(a)
}

// A streamVictim is a QP whose peer, at the other end of the stream, is the test.
type streamVictim struct {
	*end
	raw *net.TCPConn
}

const strangeQPN = 77 // the test's

func newStreamVictim(t testing.TB, n *NIC) *streamVictim {
	c, d := tcpPair(t)
	return newStreamVictimOn(t, n, c, d)
}

// newStreamVictimOn is newStreamVictim with the stream given: c is the victim's end.
func newStreamVictimOn(t testing.TB, n *NIC, c, d *net.TCPConn) *streamVictim {
	shrink(c, d)
	v := &streamVictim{end: newEnd(t, n, endConfig{typ: ib.RC, size: victimSize}), raw: d}
	v.useStream(c)
	v.connectTo(n.gid, strangeQPN)
	return v
}

// framed is a packet on a stream.
func framed(b []byte) []byte {
	return append(binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, uint16(len(b))), 0x5352), b...)
}

// to is a packet for the victim.
func (v *streamVictim) to(op roce.Opcode, n int, change func(*roce.Packet)) []byte {
	p := &roce.Packet{Opcode: op, PKey: roce.DefaultPKey, DestQP: uint32(v.q.QPN()), AckReq: true}
	if change != nil {
		change(p)
	}
	return framed(bytesOf(p, n))
}

// ended waits until the QP is in ERR, with the event and the reason.
func (v *streamVictim) ended(reason error, text string) {
	v.t.Helper()
	testutil.Eventually(v.t, "the QP went to ERR", func() bool {
		v.n.Progress()
		a, err := v.q.Query()
		return err == nil && a.State == ib.Err
	})
	if err := v.q.(*QP).StreamErr(); !errors.Is(err, reason) || !strings.Contains(err.Error(), text) {
		v.t.Errorf("the stream has ended: %v; want %v, and %q", err, reason, text)
	}
	ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
	defer cancel()
	for {
		e, err := v.n.AsyncEvent(ctx)
		if err != nil {
			v.t.Fatal(err)
		}
		if e.QP == driver.QP(v.q) {
			if e.Type != ib.EventQPFatal {
				v.t.Errorf("event %v", e.Type)
			}
			return
		}
	}
}

// The end of a stream is the peer's death: what was under way fails, what is posted later too, and receives are flushed.
func TestStreamEnds(t *testing.T) {
	n := openNIC(t, false)
	v := newStreamVictim(t, n)
	v.recv(1, v.sge(0, 64))
	v.raw.Close()
	v.ended(errPeerGone, "127.0.0.1")
	if wc := v.poll(); wc.ID != 1 || wc.Status != ib.WCFlushErr {
		t.Errorf("the receive: %+v", wc)
	}
	for i, want := range []ib.WCStatus{ib.WCRetryExceeded, ib.WCFlushErr} {
		v.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: v.sge(0, 8)})
		if wc := v.poll(); wc.ID != 2 || wc.Status != want {
			t.Errorf("request %d after the end: %+v, want %v", i, wc, want)
		}
	}

	v = newStreamVictim(t, n)
	for i := range 3 {
		v.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: v.sge(0, 8)})
	}
	v.raw.SetLinger(0)
	v.raw.Close() // a reset
	for i, want := range []ib.WCStatus{ib.WCRetryExceeded, ib.WCFlushErr, ib.WCFlushErr} {
		if wc := v.poll(); wc.ID != uint64(i) || wc.Status != want {
			t.Errorf("request %d: %+v, want %v", i, wc, want)
		}
	}
	v.ended(errPeerGone, "")
}

// What was sent before the end has come.
func TestStreamEndsBehindMessages(t *testing.T) {
	v := newStreamVictim(t, openNIC(t, false))
	for i := range 10 {
		v.recv(uint64(i), v.sge(0, 64))
	}
	var b []byte
	for i := range 9 {
		b = append(b, v.to(roce.Op(roce.RC, roce.SendOnly), 60, func(p *roce.Packet) { p.PSN = ib.PSN(i) })...)
	}
	v.raw.Write(b)
	v.raw.Close()
	for i := range 10 {
		want := ib.WCSuccess
		if i == 9 {
			want = ib.WCFlushErr
		}
		if wc := v.poll(); wc.ID != uint64(i) || wc.Status != want {
			t.Errorf("receive %d: %+v, want %v", i, wc, want)
		}
	}
}

// Whatever is no packet for the queue pair ends the stream, and harms nobody else.
func TestStreamGarbage(t *testing.T) {
	n := openNIC(t, false)
	x, y := newEnd(t, n, endConfig{typ: ib.RC}), newEnd(t, n, endConfig{typ: ib.RC})
	streamed(t, x, y)
	for name, make := range map[string]func(v *streamVictim) []byte{
		"HTTP": func(v *streamVictim) []byte { return []byte("GET / HTTP/1.1\r\n\r\n") },
		"another queue pair's": func(v *streamVictim) []byte {
			return v.to(roce.Op(roce.RC, roce.SendOnly), 8, func(p *roce.Packet) { p.DestQP = uint32(x.q.QPN()) })
		},
		"no queue pair's": func(v *streamVictim) []byte {
			return v.to(roce.Op(roce.RC, roce.SendOnly), 8, func(p *roce.Packet) { p.DestQP++ })
		},
		"another partition": func(v *streamVictim) []byte {
			return v.to(roce.Op(roce.RC, roce.SendOnly), 8, func(p *roce.Packet) { p.PKey = 0x1234 })
		},
		"UC":              func(v *streamVictim) []byte { return v.to(roce.Op(roce.UC, roce.SendOnly), 8, nil) },
		"a datagram":      func(v *streamVictim) []byte { return v.to(roce.Op(roce.UD, roce.SendOnly), 8, nil) },
		"a probe":         func(v *streamVictim) []byte { return v.to(roce.Probe, 300, nil) },
		"an answer to it": func(v *streamVictim) []byte { return v.to(roce.ProbeAnswer, 300, nil) },
		"a CNP":           func(v *streamVictim) []byte { return v.to(roce.CNP, 16, func(p *roce.Packet) { p.BECN = true }) },
		"of QP 1": func(v *streamVictim) []byte {
			return v.to(roce.Op(roce.UD, roce.SendOnly), roce.MADLen, func(p *roce.Packet) { p.DestQP = roce.GSIQP })
		},
	} {
		t.Run(name, func(t *testing.T) {
			v := newStreamVictim(t, n)
			v.t = t
			v.recv(1, v.sge(0, 64))
			for i := range v.buf {
				v.buf[i] = byte(i)
			}
			was := bytes.Clone(v.buf)
			v.raw.Write(make(v))
			v.ended(errPeerFault, "no packet")
			if wc := v.poll(); wc.Status != ib.WCFlushErr || !bytes.Equal(was, v.buf) {
				t.Errorf("the receive: %+v, or memory has changed", wc)
			}
			v.raw.SetReadDeadline(time.Now().Add(testutil.Patience))
			if _, err := io.ReadAll(v.raw); errors.Is(err, context.DeadlineExceeded) || err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("the stream is open: %v", err)
			}
		})
		x.recv(1, x.sge(0, 64))
		y.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: y.sge(0, 8)})
		for _, e := range []*end{x, y} {
			if wc := e.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("after %s, the bystanders: %+v", name, wc)
			}
		}
	}
}

// Who reads nothing gets nothing more, and holds up nobody: neither the thread that posts, nor one that polls, nor other connections.
// When he reads on, all comes.
func TestStreamSlowReader(t *testing.T) {
	n := openNIC(t, false)
	v := newStreamVictim(t, n)
	x, y := newEnd(t, n, endConfig{typ: ib.RC}), newEnd(t, n, endConfig{typ: ib.RC})
	streamed(t, x, y)
	for i := range 64 { // 64 x 8 KiB of requests that nobody takes, and 16 READs of as much that have to be answered
		v.send(ib.SendWR{ID: uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: v.sge(0, victimSize)})
	}
	for i := range 16 {
		v.raw.Write(v.to(roce.Op(roce.RC, roce.ReadRequest), 0, func(p *roce.Packet) {
			p.PSN, p.Addr, p.Len, p.RKey = ib.PSN(i*victimSize/4096), addrOf(v.buf), victimSize, uint32(v.mr.RKey())
		}))
	}
	for i := range 200 {
		x.recv(1, x.sge(0, 64))
		y.send(ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: y.sge(0, 8)})
		for _, e := range []*end{x, y} {
			if wc := e.poll(); wc.Status != ib.WCSuccess {
				t.Fatalf("message %d beside a slow reader: %+v", i, wc)
			}
		}
	}
	port := v.q.(*QP).wire.port
	port.mu.Lock()
	if port.stream.Queued() == 0 {
		t.Error("all was sent: the reader was not slow")
	}
	port.unlock()
	// The reader takes what there is, until it has every request and every answer.
	requests, answers := 0, 0
	head := make([]byte, 4)
	body := make([]byte, roce.MaxPacket)
	for requests < 64 || answers < 16 {
		v.raw.SetReadDeadline(time.Now().Add(testutil.Patience))
		if _, err := io.ReadFull(v.raw, head); err != nil {
			t.Fatalf("after %d requests and %d answers: %v", requests, answers, err)
		}
		b := body[:binary.LittleEndian.Uint16(head)]
		if _, err := io.ReadFull(v.raw, b); err != nil {
			t.Fatal(err)
		}
		var p roce.Packet
		if err := p.Decode(b); err != nil || p.DestQP != strangeQPN {
			t.Fatalf("%v, %+v", err, p)
		}
		switch {
		case !p.Opcode.Last():
		case p.Opcode.IsResponse():
			answers++
		default:
			requests++
		}
	}
	v.raw.Close()
	v.ended(errPeerGone, "")
}

// Both sides send more than the sockets hold, at the same time, and get all of it through: whoever cannot send still receives.
func TestStreamBothWaysFull(t *testing.T) {
	for _, sleeping := range []bool{false, true} {
		t.Run(fmt.Sprint("sleeping ", sleeping), func(t *testing.T) {
			a, b := newEnd(t, openNIC(t, false), endConfig{typ: ib.RC, size: 512 << 10}), newEnd(t, openNIC(t, false), endConfig{typ: ib.RC, size: 512 << 10})
			c, d := tcpPair(t)
			shrink(c, d)
			a.useStream(c)
			b.useStream(d)
			a.connect(b)
			b.connect(a)
			half := len(a.buf) / 2
			for i := range half {
				a.buf[i], b.buf[i] = byte(i*7), byte(i*11)
			}
			var wg sync.WaitGroup
			for _, e := range [][2]*end{{a, b}, {b, a}} {
				wg.Go(func() {
					e, peer := e[0], e[1]
					for range 4 {
						for i, op := range []ib.Opcode{ib.OpRDMAWrite, ib.OpRDMARead, ib.OpRDMAWrite} {
							e.send(ib.SendWR{ID: uint64(i), Opcode: op, Flags: ib.SendSignaled, SGEs: e.sge([]int{0, half, 0}[i], half/(1+i%2)),
								RemoteAddr: addrOf(peer.buf) + uint64([]int{half, 0, half}[i]), RKey: peer.mr.RKey()})
						}
						for i := range 3 {
							var wc ib.WC
							if wc = e.next(sleeping); wc.Status != ib.WCSuccess || wc.ID != uint64(i) {
								t.Errorf("request %d: %+v", i, wc)
								return
							}
						}
					}
				})
			}
			wg.Wait()
			if !t.Failed() && (!bytes.Equal(a.buf[:half], b.buf[half:]) || !bytes.Equal(b.buf[:half], a.buf[half:])) {
				t.Error("other bytes have come than were written")
			}
		})
	}
}

// next is poll for any goroutine, which may sleep until there is something.
func (e *end) next(sleep bool) ib.WC {
	var wc [1]ib.WC
	for until := time.Now().Add(testutil.Patience); ; {
		if e.cq.Poll(wc[:]) == 1 {
			return wc[0]
		}
		if !sleep {
			if time.Now().After(until) {
				e.t.Error("no completion")
				return ib.WC{}
			}
			continue
		}
		if err := e.cq.Arm(false); err != nil {
			e.t.Error(err)
			return ib.WC{}
		}
		if e.cq.Poll(wc[:]) == 1 {
			return wc[0]
		}
		ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
		_, err := e.ch.Wait(ctx)
		cancel()
		if err != nil {
			e.t.Errorf("sleeping: %v", err)
			return ib.WC{}
		}
	}
}

// What streams have sent and met is in the NIC's counters, of all of them together, and stays there when they have ended.
func TestStreamCounters(t *testing.T) {
	na, nb := openNIC(t, false), openNIC(t, false)
	if c := na.Counters(); len(c.Ports) != 0 {
		t.Errorf("without a stream: %+v", c.Ports)
	}
	const streams, messages = 3, 5
	var ends []*end
	var want observe.Port
	for range streams {
		a, b := makeEnd(t, na, endConfig{typ: ib.RC, size: 4096}), makeEnd(t, nb, endConfig{typ: ib.RC, size: 4096})
		streamed(t, a, b)
		talk(t, a, b, messages, 1)
		ends = append(ends, a, b)
	}
	for _, q := range na.Counters().QPs {
		want.Total.Sent += q.Wire.Sent
	}
	if n := want.Total.Sent; n < streams*messages {
		t.Fatalf("the queue pairs have sent %d packets", n)
	}
	check := func(alive int) {
		t.Helper()
		c := na.Counters().Ports
		if len(c) != 1 || c[0].Path != pathTCP || c[0].Conns != alive || c[0].Total.Sent != want.Total.Sent || c[0].Sent < want.Total.Sent || c[0].Received < streams {
			t.Errorf("with %d streams: %+v, want %d packets of requests", alive, c, want.Total.Sent)
		}
	}
	check(streams)
	for i, e := range ends {
		e.close()
		if i == 1 {
			check(streams - 1)
		}
	}
	check(0)
	ended(t, na, map[string]uint64{observe.EndedHere: streams})
}

// ended checks how the streams of a NIC have ended, none of which was refused anything.
func ended(t testing.TB, n *NIC, want map[string]uint64) {
	t.Helper()
	if p := n.Counters().Ports[0]; !maps.Equal(p.Ended, want) || p.Refusal != "" && p.Ended[observe.EndedLost] == 0 {
		t.Errorf("the streams have ended %v, refused for %q; want %v", p.Ended, p.Refusal, want)
	}
}

// How streams have ended is counted, while their queue pairs are there and when they are gone; and none of them says that it was refused.
func TestStreamEndsCounted(t *testing.T) {
	n := openNIC(t, false)
	v := newStreamVictim(t, n)
	v.raw.Close()
	v.ended(errPeerGone, "")
	want := map[string]uint64{observe.EndedByPeer: 1}
	ended(t, n, want)
	v.close()
	ended(t, n, want)
	v = newStreamVictim(t, n)
	v.raw.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	v.ended(errPeerFault, "")
	want[observe.EndedBroken] = 1
	ended(t, n, want)
	newStreamVictim(t, n).close()
	want[observe.EndedHere] = 1
	ended(t, n, want)
}

// More streams than pollers look at work, too, and those that are left when some have ended.
func TestStreamsMany(t *testing.T) {
	na, nb := openNIC(t, false), openNIC(t, false)
	var as, bs []*end
	for range 3 * maxPolled {
		a, b := makeEnd(t, na, endConfig{typ: ib.RC, size: 4096}), makeEnd(t, nb, endConfig{typ: ib.RC, size: 4096})
		streamed(t, a, b)
		as, bs = append(as, a), append(bs, b)
	}
	for len(as) > 0 {
		for i := range as {
			for _, sleep := range []bool{false, true} {
				bs[i].recv(1, bs[i].sge(0, 64))
				as[i].send(ib.SendWR{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: as[i].sge(0, 8)})
				for _, e := range []*end{bs[i], as[i]} {
					if wc := e.next(sleep); wc.Status != ib.WCSuccess {
						t.Fatalf("of %d streams, number %d: %+v", len(as), i, wc)
					}
				}
			}
		}
		k := max(len(as)-maxPolled, 0)
		for i := k; i < len(as); i++ {
			as[i].close()
			bs[i].close()
		}
		as, bs = as[:k], bs[:k]
	}
	if l := na.streams.all.Load(); l != nil {
		t.Errorf("%d streams are left", len(*l))
	}
}

// What has come before the queue pair is ready for it is not received before: nobody looks at the stream until then.
func TestStreamPolledWhileConnected(t *testing.T) {
	n := openNIC(t, false)
	c, d := tcpPair(t)
	v := &streamVictim{end: newEnd(t, n, endConfig{typ: ib.RC, size: victimSize}), raw: d}
	v.useStream(c)
	v.recv(1, v.sge(0, 64))
	v.raw.Write(v.to(roce.Op(roce.RC, roce.SendOnly), 60, nil))
	q := v.q.(*QP)
	q.rq.Lock() // holds it up on its way to RTR
	connected := make(chan struct{})
	go func() {
		defer close(connected)
		v.connectTo(n.gid, strangeQPN)
	}()
	testutil.Eventually(t, "the queue pair is on its way", func() bool {
		n.streams.mu.Lock()
		l := n.streams.link
		n.streams.mu.Unlock()
		if l == nil {
			return false
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.ports[v.cq.(*CQ)]) > 0
	})
	for range 10 {
		n.pollPorts()
	}
	q.rq.Unlock()
	<-connected
	if wc := v.poll(); wc.ID != 1 || wc.Status != ib.WCSuccess {
		t.Errorf("%+v; the stream: %v", wc, q.StreamErr())
	}
}

func TestUseStreamRefused(t *testing.T) {
	n := openNIC(t, false)
	c, d := tcpPair(t)
	uc := newEnd(t, n, endConfig{typ: ib.UC})
	rc := newEnd(t, n, endConfig{typ: ib.RC})
	if err := uc.q.(*QP).UseStream(c); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("UC: %v", err)
	}
	if err := rc.q.(*QP).UseStream(c); !errors.Is(err, driver.ErrState) {
		t.Errorf("RESET: %v", err)
	}
	rc.useStream(c)
	if err := rc.q.(*QP).UseStream(d); !errors.Is(err, driver.ErrState) {
		t.Errorf("twice: %v", err)
	}
	// RESET ends a stream that was not used.
	if err := rc.q.Modify(context.Background(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); err != nil {
		t.Fatal(err)
	}
	d.SetReadDeadline(time.Now().Add(testutil.Patience))
	if k, err := d.Read(make([]byte, 1)); k != 0 || err != io.EOF {
		t.Errorf("%d bytes, %v on a stream whose queue pair was reset", k, err)
	}
	d.Close()
	rc.init()
	if err := rc.q.(*QP).UseStream(d); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a connection that is closed: %v", err)
	}
}

// FuzzStream has a queue pair receive whatever comes: it takes messages, or ends the stream, and goes to ERR with it.
func FuzzStream(f *testing.F) {
	n := openNIC(f, false)
	seed := newStreamVictim(f, n)
	op := func(o uint8) roce.Opcode { return roce.Op(roce.RC, o) }
	one := seed.to(op(roce.SendOnly), 60, nil)
	f.Add(one)
	f.Add(append(bytes.Clone(one), seed.to(op(roce.ReadRequest), 0, func(p *roce.Packet) { p.PSN, p.Len = 1, 1<<31 })...))
	f.Add(append(bytes.Clone(one), seed.to(op(roce.WriteFirst), 4096, func(p *roce.Packet) { p.PSN, p.Len = 1, 1<<31 })...))
	f.Add(seed.to(op(roce.Acknowledge), 0, func(p *roce.Packet) { p.Syndrome = roce.NakPSN }))
	f.Add(seed.to(op(roce.SendMiddle), 4096, func(p *roce.Packet) { p.PSN = 5 }))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v := newStreamVictim(t, n)
		b = bytes.Clone(b)
		for at := 0; at+12 <= len(b); { // for this queue pair
			binary.BigEndian.PutUint32(b[at+8:], binary.BigEndian.Uint32(b[at+8:])&0xff000000|uint32(v.q.QPN()))
			at += 4 + int(binary.LittleEndian.Uint16(b[at:]))
		}
		for i := range v.buf {
			v.buf[i] = byte(i)
		}
		was := bytes.Clone(v.buf)
		for i := range 4 {
			v.recv(uint64(i), v.sge(0, victimRecv))
		}
		v.send(ib.SendWR{ID: 9, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: v.sge(0, 64)})
		go io.Copy(io.Discard, v.raw)
		v.raw.Write(b)
		v.raw.CloseWrite()
		for range 5 {
			v.poll()
		}
		if !bytes.Equal(was[victimRecv:], v.buf[victimRecv:]) {
			t.Error("memory has changed for which the peer has no key")
		}
		if err := v.q.(*QP).StreamErr(); err != nil && !errors.Is(err, errPeerGone) && !errors.Is(err, errPeerFault) {
			t.Error(err)
		}
	})
}
