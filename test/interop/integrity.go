package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// integrity is a run of the random sequence with a peer. In each round both sides
//
//  1. make the next batch of both directions, post the receives that the peer's needs, and tell the peer;
//  2. post their own batch in one call, and wait for all of its completions and for the receives';
//  3. tell the peer, and compare their memory with the model.
//
// Over TCP the client introduces itself by a line, the server answers by the same line with its own numbers once its queue
// pair is connected, and before and after each batch both send the state of their generators, which shows whether they
// compute the same.
type integrity struct {
	server   string // host to connect to; empty: be the server
	port     int
	device   string
	ibPort   uint8
	gidIndex int
	mtu      int    // bytes; a server takes the client's
	seed     uint64 // ... this too
	rounds   int    // ... and this
	events   bool

	lostResults bool // put up with atomics that complete without their result, as between two rxe (see sequence.go)

	listener net.Listener // as in pingPong
}

func integrityDefaults() integrity {
	return integrity{port: 18516, ibPort: 1, gidIndex: -1, mtu: 1024, seed: 1, rounds: 200}
}

// An integrityResult counts what was done.
type integrityResult struct {
	device   string
	seed     uint64
	rounds   int
	ops      int // of both sides
	bytes    int // moved by them
	received int // completions of receives on this side
	lost     int // results of atomics on this side
	took     time.Duration
}

func (r integrityResult) String() string {
	lost := ""
	if r.lost > 0 {
		lost = fmt.Sprintf(", but for the results of %d atomics", r.lost)
	}
	return fmt.Sprintf("%s: seed %#x: %d rounds, %d operations, %d bytes, %d receives here: all memory as it must be%s (%.1f s)",
		r.device, r.seed, r.rounds, r.ops, r.bytes, r.received, lost, r.took.Seconds())
}

// hello is the line by which a side introduces itself.
type hello struct {
	seed   uint64
	rounds int
	mtu    int
	at     qp.Endpoint
	window mr.RemoteKey
}

const (
	helloFormat = "ringside-integrity 1 seed=%016x rounds=%d mtu=%d qpn=%06x psn=%06x gid=%s addr=%016x rkey=%08x\n"
	helloMax    = 256
	roundsMax   = 1_000_000
)

func (h hello) String() string {
	return fmt.Sprintf(helloFormat, h.seed, h.rounds, h.mtu, uint32(h.at.QPN), uint32(h.at.PSN),
		hex.EncodeToString(h.at.GID[:]), h.window.Addr, uint32(h.window.RKey))
}

// usable returns why what the client has chosen cannot be used, or nil.
func (h hello) usable() error {
	switch {
	case h.rounds < 0 || h.rounds > roundsMax:
		return fmt.Errorf("%d rounds: there can be up to %d", h.rounds, roundsMax)
	case h.mtu <= 0 || ib.MTUFor(h.mtu).Bytes() != h.mtu:
		return fmt.Errorf("an MTU of %d bytes: there are 256, 512, 1024, 2048 and 4096", h.mtu)
	}
	return nil
}

// parseHello reads a line of the peer, which may be anything.
func parseHello(line string) (h hello, err error) {
	var qpn, psn, rkey uint32
	var gid string
	n, err := fmt.Sscanf(line, helloFormat, &h.seed, &h.rounds, &h.mtu, &qpn, &psn, &gid, &h.window.Addr, &rkey)
	if err != nil {
		return hello{}, fmt.Errorf("not an introduction: %q: field %d: %w", line, n+1, err)
	}
	b, err := hex.DecodeString(gid)
	switch {
	case err != nil || len(b) != len(h.at.GID):
		return hello{}, fmt.Errorf("not a GID: %q", gid)
	case qpn > uint32(ib.MaxQPN) || psn > uint32(ib.MaxPSN):
		return hello{}, fmt.Errorf("not a queue pair: QPN %#x, PSN %#x", qpn, psn)
	}
	if err := h.usable(); err != nil {
		return hello{}, err
	}
	copy(h.at.GID[:], b)
	h.at.QPN, h.at.PSN = ib.QPN(qpn), ib.PSN(psn)
	h.window.Len, h.window.RKey = windowSize, ib.RKey(rkey)
	return h, nil
}

// run does the rounds. It fails on the first completion or byte that is not what the model says.
func (o *integrity) run(ctx context.Context) (r integrityResult, err error) {
	var objects closers
	defer objects.closeAll(&err)
	if o.listener != nil {
		defer o.listener.Close()
	}
	if err := usable(o.port, o.ibPort); err != nil {
		return r, err
	}
	mine := hello{seed: o.seed, rounds: o.rounds, mtu: o.mtu}
	if o.server != "" {
		if err := mine.usable(); err != nil {
			return r, err
		}
	}
	dev, port, gid, err := openPort(o.device, o.ibPort, o.gidIndex, &objects)
	if err != nil {
		return r, err
	}
	s := &sides{o: o, ctx: ctx}
	if err := s.open(dev, &objects); err != nil {
		return r, err
	}
	mine.at = qp.Endpoint{GID: gid, LID: port.LID, QPN: s.qp.QPN(), PSN: qp.RandomPSN()}
	mine.window = s.window.Remote()
	conn, err := s.meet(mine)
	if err != nil {
		return r, err
	}
	defer conn.Close()
	start := time.Now()
	for round := range s.theirs.rounds {
		if err := s.round(round, &r); err != nil {
			return r, fmt.Errorf("seed %#x, round %d: %w\nthis side's batch:\n%sthe peer's:\n%s",
				s.theirs.seed, round, err, s.out.describe(), s.in.describe())
		}
	}
	r.device, r.seed, r.rounds, r.took = dev.Name(), s.theirs.seed, s.theirs.rounds, time.Since(start)
	return r, nil
}

// sides is the state of a run on this side.
type sides struct {
	o      *integrity
	ctx    context.Context
	done   *completions
	qp     *qp.QP
	local  *mr.MR
	window *mr.MR

	conn    net.Conn
	in, out *direction // the peer's operations on this side, and this side's on the peer
	reader  *bufio.Reader
	theirs  hello

	wrs    []ib.SendWR
	recvs  []ib.RecvWR
	inline [batchMax][inlineMax]byte
}

func (s *sides) open(dev *verbs.Context, objects *closers) error {
	pd, err := dev.AllocPD()
	if err != nil {
		return err
	}
	objects.add(pd)
	// One memory of each kind: outside of the Go heap, and an ordinary slice.
	if s.window, err = mr.Alloc(pd, windowSize, ib.AccessLocalWrite|ib.AccessRemote); err != nil {
		return err
	}
	objects.add(s.window)
	if s.local, err = mr.Register(pd, make([]byte, localSize), ib.AccessLocalWrite); err != nil {
		return err
	}
	objects.add(s.local)
	if s.done, err = newCompletions(dev, 4*batchMax, s.o.events, objects); err != nil {
		return err
	}
	s.qp, err = qp.New(pd, &qp.Config{SendCQ: s.done.cq, SendDepth: 2 * batchMax, RecvDepth: 2 * batchMax,
		SendSGE: pieces, RecvSGE: pieces, MaxInline: inlineMax})
	if err != nil {
		return err
	}
	objects.add(s.qp)
	return s.qp.Init(s.ctx, s.o.ibPort, ib.AccessRemote)
}

// meet introduces both sides to each other and connects them.
func (s *sides) meet(mine hello) (conn net.Conn, err error) {
	if s.o.server == "" {
		s.conn, err = accept(s.ctx, s.o.listener, s.o.port)
	} else {
		s.conn, err = dial(s.ctx, s.o.server, s.o.port)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.conn.Close()
		}
	}()
	s.reader = bufio.NewReaderSize(s.conn, helloMax)
	if s.o.server != "" {
		if _, err := io.WriteString(s.conn, mine.String()); err != nil {
			return nil, err
		}
	}
	line, err := s.reader.ReadSlice('\n') // no longer than the reader's buffer
	if err != nil {
		return nil, fmt.Errorf("waiting for the peer's introduction: %w", err)
	}
	if s.theirs, err = parseHello(string(line)); err != nil {
		return nil, err
	}
	if s.o.server == "" {
		mine.seed, mine.rounds, mine.mtu = s.theirs.seed, s.theirs.rounds, s.theirs.mtu
	} else if s.theirs.seed != mine.seed || s.theirs.rounds != mine.rounds || s.theirs.mtu != mine.mtu {
		return nil, fmt.Errorf("the server answered with other parameters: %v", s.theirs)
	}
	err = s.qp.Connect(s.ctx, qp.ConnectParams{Remote: s.theirs.at, LocalPSN: mine.at.PSN, SGIDIndex: max(s.o.gidIndex, 0),
		MTU: ib.MTUFor(mine.mtu), MaxRdAtomic: 4, MaxDestRdAtomic: 4})
	if err != nil {
		return nil, err
	}
	server := s.o.server == ""
	s.out, s.in = newDirection(mine.seed, server), newDirection(mine.seed, !server)
	copy(s.local.Bytes(), s.out.local)
	copy(s.window.Bytes(), s.in.window)
	if server {
		if _, err := io.WriteString(s.conn, mine.String()); err != nil {
			return nil, err
		}
	}
	return s.conn, nil
}

// meetUp tells the peer that this side has come to a point, and waits until it has come there, too.
func (s *sides) meetUp(point byte) error {
	a, b := s.out, s.in
	if s.o.server == "" {
		a, b = b, a
	}
	mine := fmt.Sprintf("%c%016x%016x\n", point, uint64(a.random), uint64(b.random))
	if _, err := io.WriteString(s.conn, mine); err != nil {
		return fmt.Errorf("the peer has gone: %w", err)
	}
	theirs := make([]byte, len(mine))
	if _, err := io.ReadFull(s.reader, theirs); err != nil {
		return fmt.Errorf("the peer has ended early: %w", err)
	}
	if string(theirs) != mine {
		return fmt.Errorf("the peer computes something else: it is at %q, and this side at %q", theirs, mine)
	}
	return nil
}

const (
	pointPosted = 'P' // the receives for the peer's batch are posted
	pointDone   = 'D' // the own batch and the receives are complete
)

func (s *sides) round(round int, r *integrityResult) error {
	s.out.next()
	s.in.next()
	if err := s.postReceives(round); err != nil {
		return err
	}
	if err := s.meetUp(pointPosted); err != nil {
		return err
	}
	if err := s.postBatch(round); err != nil {
		return err
	}
	if err := s.complete(round); err != nil {
		return err
	}
	if err := s.meetUp(pointDone); err != nil {
		return err
	}
	if s.o.lostResults {
		r.lost += s.out.findLost(s.local.Bytes())
	}
	if err := differ(s.local.Bytes(), s.out.local); err != nil {
		return fmt.Errorf("memory that this side sends from and reads into: %w", err)
	}
	if err := differ(s.window.Bytes(), s.in.window); err != nil {
		return fmt.Errorf("memory that the peer works on: %w", err)
	}
	r.received += len(s.recvs)
	for _, d := range []*direction{s.in, s.out} {
		r.ops += len(d.batch)
		for i := range d.batch {
			r.bytes += d.batch[i].total
		}
	}
	return nil
}

// id is the work request ID of the n-th request of a kind in a round.
func id(round, n int, recv bool) uint64 {
	v := uint64(round)<<8 | uint64(n)
	if recv {
		v |= 1 << 63
	}
	return v
}

func sges(m *mr.MR, spans []span) []ib.SGE {
	var l []ib.SGE
	for _, s := range spans {
		l = append(l, m.SGE(s.off, s.n))
	}
	return l
}

// postReceives posts, in one call, what the peer's batch takes.
func (s *sides) postReceives(round int) error {
	s.recvs = s.recvs[:0]
	for i := range s.in.batch {
		if o := &s.in.batch[i]; o.takesRecv {
			s.recvs = append(s.recvs, ib.RecvWR{ID: id(round, len(s.recvs), true), SGEs: sges(s.window, o.recv)})
		}
	}
	if len(s.recvs) == 0 {
		return nil
	}
	_, err := s.qp.PostRecv(s.recvs)
	return err
}

// postBatch posts this side's batch in one call.
func (s *sides) postBatch(round int) error {
	s.wrs = s.wrs[:0]
	for i := range s.out.batch {
		o := &s.out.batch[i]
		wr := ib.SendWR{ID: id(round, i, false), Opcode: o.opcode, Flags: o.flags, Imm: o.imm,
			CompareAdd: o.compareAdd, Swap: o.swap}
		if o.opcode != ib.OpSend && o.opcode != ib.OpSendWithImm {
			wr.RemoteAddr, wr.RKey = s.theirs.window.Addr+uint64(o.remote), s.theirs.window.RKey
		}
		inline := s.inline[i][:0]
		for _, p := range o.local {
			if !o.gets() {
				copy(s.local.Bytes()[p.off:p.off+p.n], s.out.local[p.off:])
			}
			if o.inline {
				inline = append(inline, s.out.local[p.off:p.off+p.n]...)
			}
		}
		if o.inline {
			wr.Inline = inline
		} else {
			wr.SGEs = sges(s.local, o.local)
		}
		s.wrs = append(s.wrs, wr)
	}
	if len(s.wrs) == 0 {
		return nil
	}
	_, err := s.qp.PostSend(s.wrs)
	return err
}

// complete waits for the completions of a round, and compares each with the model. Those of sends come in order, as do those
// of receives.
func (s *sides) complete(round int) error {
	var sends, recvs []ib.WC // what must come
	for i := range s.out.batch {
		o := &s.out.batch[i]
		if o.flags&ib.SendSignaled == 0 {
			continue
		}
		wc := ib.WC{ID: id(round, i, false), Opcode: ib.WCOpcodeOf(o.opcode), QPN: s.qp.QPN()}
		if o.gets() {
			wc.ByteLen = uint32(o.total)
		}
		sends = append(sends, wc)
	}
	for i := range s.in.batch {
		o := &s.in.batch[i]
		if !o.takesRecv {
			continue
		}
		wc := ib.WC{ID: id(round, len(recvs), true), Opcode: ib.WCRecv, QPN: s.qp.QPN(), ByteLen: uint32(o.total)}
		if o.opcode == ib.OpRDMAWriteWithImm {
			wc.Opcode = ib.WCRecvRDMAWithImm
		}
		if o.opcode != ib.OpSend {
			wc.Flags, wc.Imm = ib.WCWithImm, o.imm
		}
		recvs = append(recvs, wc)
	}
	for len(sends)+len(recvs) > 0 {
		wcs, err := s.done.next(s.ctx)
		if err != nil {
			return fmt.Errorf("waiting for %d sends and %d receives: %w", len(sends), len(recvs), err)
		}
		for i := range wcs {
			wc := &wcs[i]
			if err := verbs.CheckWC("integrity", wc); err != nil {
				return err
			}
			kind := &sends
			if wc.ID>>63 != 0 {
				kind = &recvs
			}
			if len(*kind) == 0 {
				return fmt.Errorf("a completion too many: %+v", *wc)
			}
			if err := sameWC(wc, &(*kind)[0]); err != nil {
				return err
			}
			*kind = (*kind)[1:]
		}
	}
	return nil
}

// sameWC compares what a completion says about its request. Others of its fields are the device's own affair.
func sameWC(got, want *ib.WC) error {
	g := *got
	g.SL, g.PKeyIndex, g.SLID, g.SrcQPN, g.VendorErr = 0, 0, 0, 0, 0
	g.Flags &^= ib.WCGRH // for datagrams only; the kernel's rxe says it of all receives
	if !want.Opcode.IsRecv() {
		g.Flags = 0 // say something about receives
		if want.ByteLen == 0 {
			g.ByteLen = 0 // and this about what has arrived here
		}
	}
	if g.Flags&ib.WCWithImm == 0 {
		g.Imm = 0
	}
	if g.Flags&ib.WCWithInv == 0 {
		g.InvalidatedRKey = 0
	}
	if g != *want {
		return fmt.Errorf("a completion is not what it must be\ngot  %+v\nwant %+v", *got, *want)
	}
	return nil
}
