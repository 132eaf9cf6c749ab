package udp_test

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/roce"
	"github.com/ringside-rdma/ringside/internal/softnic/udp"
	"github.com/ringside-rdma/ringside/internal/softnic/wire"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// An endpoint is a connection over a Socket, reliable or not, with a memory that its peer may do everything with, which begins at memAddr.
type endpoint struct {
	t    *testing.T
	sock *udp.Socket
	peer *udp.Peer
	qpn  uint32
	req  *wire.Requester
	resp *wire.Responder
	uc   bool // the next two are used instead
	ureq *wire.UCRequester
	ursp *wire.UCResponder
	born time.Time
	lose func() bool // whether a packet that came is lost

	mem   []byte
	sends []sendBuf
	done  []ib.WCStatus
	recvs int
	part  []byte
	got   []received
	fatal ib.WCStatus
}

type sendBuf struct{ from, to []byte }

type received struct {
	wire.Message
	data []byte
	st   ib.WCStatus
}

const (
	memAddr = 0x7000
	memRKey = 0x1234
	memLen  = 1 << 16
)

func newEndpoint(t *testing.T, sock *udp.Socket, to netip.AddrPort, qpn uint32, cfg wire.Config) *endpoint {
	e := &endpoint{t: t, sock: sock, qpn: qpn, mem: make([]byte, memLen), born: time.Now()}
	var err error
	if e.peer, err = sock.Peer(to); err != nil {
		t.Fatal(err)
	}
	e.req, e.resp = wire.NewRequester(cfg, e), wire.NewResponder(cfg, endpointTarget{e})
	e.ureq, e.ursp = wire.NewUCRequester(cfg, e), wire.NewUCResponder(cfg, endpointTarget{e})
	return e
}

func (e *endpoint) post(r wire.Request, from, to []byte) {
	r.Len = uint32(max(len(from), len(to)))
	e.sends = append(e.sends, sendBuf{from, to})
	if e.uc {
		e.ureq.Post(&r)
	} else {
		e.req.Post(&r)
	}
}

// run drives the connection until done says that it is enough.
func (e *endpoint) run(done func() bool) {
	e.t.Helper()
	limit := time.Now().Add(20 * time.Second)
	for !done() {
		if time.Now().After(limit) {
			e.t.Errorf("nothing comes to an end: %d requests left, %+v, %+v, %+v", e.req.Queued(), e.req.Counters, e.resp.Counters, e.sock.Counters)
			return
		}
		now := time.Since(e.born)
		e.req.Expire(now)
		e.resp.Pump(now, e.peer)
		e.req.Pump(now, e.peer)
		e.ureq.Pump(now, e.peer)
		e.sock.Flush()
		wait := 10 * time.Millisecond
		if d := e.req.Deadline(); d != 0 {
			wait = min(wait, max(0, d-now))
		}
		_, _, err := e.sock.Receive(time.Now().Add(wait), func(_ netip.AddrPort, p *roce.Packet) {
			if e.lose != nil && e.lose() || p.DestQP != e.qpn {
				return
			}
			switch {
			case e.uc && p.Opcode.Service() == roce.UC:
				e.ursp.Receive(p)
			case p.Opcode.Service() != roce.RC || e.uc:
				e.t.Errorf("%v came", p.Opcode)
			case p.Opcode.IsResponse():
				e.req.Receive(p, time.Since(e.born))
			default:
				e.resp.Receive(p)
			}
		})
		if err != nil {
			e.t.Error(err)
			return
		}
	}
}

// finish runs until all requests have ended.
func (e *endpoint) finish() {
	e.t.Helper()
	e.run(func() bool { return e.req.Queued() == 0 && e.ureq.Queued() == 0 })
}

// serve runs until stop is true.
func (e *endpoint) serve(stop *atomic.Bool) { e.run(stop.Load) }

func (e *endpoint) Gather(n, off uint32, dst []byte) bool {
	copy(dst, e.sends[n].from[off:])
	return true
}

func (e *endpoint) Scatter(n, off uint32, src []byte) bool {
	copy(e.sends[n].to[off:], src)
	return true
}

func (e *endpoint) Complete(_ uint32, st ib.WCStatus) { e.done = append(e.done, st) }

// endpointTarget is the Target of an endpoint: Complete has another meaning there.
type endpointTarget struct{ *endpoint }

func (e endpointTarget) Take() bool {
	if e.recvs == 0 {
		return false
	}
	e.recvs--
	return true
}

func (e endpointTarget) Put(off uint32, data []byte) ib.WCStatus {
	if off == 0 {
		e.part = nil
	}
	e.part = append(e.part, data...)
	return ib.WCSuccess
}

func (e endpointTarget) Complete(m wire.Message, st ib.WCStatus) {
	if m.Len == 0 || m.Write {
		e.part = nil
	}
	e.got = append(e.got, received{m, e.part, st})
}

func (e endpointTarget) at(rkey uint32, addr uint64, n int) ([]byte, ib.WCStatus) {
	if rkey != memRKey || addr < memAddr || addr-memAddr > memLen || uint64(n) > memLen-(addr-memAddr) {
		return nil, ib.WCRemoteAccessErr
	}
	return e.mem[addr-memAddr:][:n], ib.WCSuccess
}

func (e endpointTarget) Check(rkey uint32, addr uint64, n uint32, _ ib.Access) ib.WCStatus {
	_, st := e.at(rkey, addr, int(n))
	return st
}

func (e endpointTarget) Write(rkey uint32, addr uint64, data []byte) ib.WCStatus {
	b, st := e.at(rkey, addr, len(data))
	copy(b, data)
	return st
}

func (e endpointTarget) Read(rkey uint32, addr uint64, dst []byte) ib.WCStatus {
	b, st := e.at(rkey, addr, len(dst))
	copy(dst, b)
	return st
}

func (e endpointTarget) Atomic(rkey uint32, addr uint64, op ib.Opcode, compareAdd, swap uint64) (uint64, ib.WCStatus) {
	b, st := e.at(rkey, addr, 8)
	if st != ib.WCSuccess {
		return 0, st
	}
	old := binary.NativeEndian.Uint64(b)
	switch {
	case op == ib.OpAtomicFetchAdd:
		binary.NativeEndian.PutUint64(b, old+compareAdd)
	case old == compareAdd:
		binary.NativeEndian.PutUint64(b, swap)
	}
	return old, ib.WCSuccess
}

func (e endpointTarget) Flush(rkey uint32, addr uint64, f ib.Flush) ib.WCStatus {
	_, st := e.at(rkey, addr, int(f.Length))
	return st
}

func (e endpointTarget) Invalidate(uint32) ib.WCStatus { return ib.WCSuccess }
func (e endpointTarget) Fail(st ib.WCStatus)           { e.fatal = st }
