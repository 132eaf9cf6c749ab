package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A service names one of rdma-core's examples.
type service string

const (
	rc  service = "rc"
	uc  service = "uc"
	ud  service = "ud"
	srq service = "srq"
)

// udKey is the Q_Key of ibv_ud_pingpong.
const udKey ib.QKey = 0x11111111

// pingPong is a run of one of the examples. The defaults are those of the C programs.
type pingPong struct {
	service  service
	server   string // host to connect to; empty: be the server
	port     int    // of TCP
	device   string
	ibPort   uint8
	gidIndex int
	size     int // bytes of a message
	mtu      int // bytes; not for UD
	rxDepth  int
	iters    int // exchanges of all queue pairs together
	numQP    int // 1 except with a shared receive queue
	sl       uint8
	events   bool
	check    bool
	fill     int // what the messages of the server's client consist of, at page starts 0; -1: not known

	out      io.Writer    // the addresses are printed here; nil: nowhere
	listener net.Listener // where the server gets its client, and closed then; nil: one on port
	// beforeClose is called when all messages are exchanged and the queue pairs still answer. The C programs destroy theirs
	// at once, which the peer's last acknowledgement has to outrun.
	beforeClose func()
}

func defaults(s service) pingPong {
	o := pingPong{service: s, port: 18515, ibPort: 1, gidIndex: -1, size: 4096, mtu: 1024, rxDepth: 500, iters: 1000,
		numQP: 1, fill: -1}
	switch s {
	case ud:
		o.size = 1024
	case srq:
		o.numQP = 16
	}
	return o
}

// A pingPongResult says what one side has measured.
type pingPongResult struct {
	device string
	path   string // how the first queue pair reaches its peer, where the device says
	size   int
	iters  int
	events int // waits for completion events; 0 when polling
	took   time.Duration
}

func (r pingPongResult) String() string {
	us := float64(r.took.Nanoseconds()) / 1e3
	bytes := 2 * float64(r.size) * float64(r.iters)
	s := fmt.Sprintf("%s: %.0f bytes in %.2f seconds = %.2f Mbit/sec, %d iters = %.2f usec/iter",
		r.device, bytes, us/1e6, bytes*8/us, r.iters, us/float64(r.iters))
	if r.path != "" {
		s += ", by " + r.path
	}
	if r.events > 0 {
		s += fmt.Sprintf(", %d events", r.events)
	}
	return s
}

// usable returns why the options cannot be used on a port, or nil.
func (o *pingPong) usable(port ib.PortAttr) error {
	switch {
	case o.size < 1 || uint64(o.size) > uint64(port.MaxMessage):
		return fmt.Errorf("messages of %d bytes: the port takes 1 to %d", o.size, port.MaxMessage)
	case o.service == ud && o.size > port.ActiveMTU.Bytes():
		return fmt.Errorf("messages of %d bytes: a datagram has at most the port's MTU of %d", o.size, port.ActiveMTU.Bytes())
	case o.service != ud && ib.MTUFor(o.mtu).Bytes() != o.mtu:
		return fmt.Errorf("an MTU of %d bytes: there are 256, 512, 1024, 2048 and 4096", o.mtu)
	case o.iters < 1:
		return fmt.Errorf("%d exchanges", o.iters)
	case o.numQP < 1 || o.numQP >= srqSlots:
		return fmt.Errorf("%d queue pairs: use 1 to %d", o.numQP, srqSlots-1)
	case o.rxDepth < o.numQP:
		return fmt.Errorf("%d receives are too few for %d queue pairs", o.rxDepth, o.numQP)
	case o.fill > 255:
		return fmt.Errorf("%d is not a byte", o.fill)
	}
	return nil
}

// run exchanges the messages. It fails if anything did not arrive, or with check, not as it was sent.
func (o *pingPong) run(ctx context.Context) (r pingPongResult, err error) {
	var objects closers
	defer objects.closeAll(&err)
	if o.listener != nil {
		defer o.listener.Close() // also if the run gets no further than the device
	}
	if err := usable(o.port, o.ibPort); err != nil {
		return r, err
	}
	dev, port, gid, err := openPort(o.device, o.ibPort, o.gidIndex, &objects)
	if err != nil {
		return r, err
	}
	if err := o.usable(port); err != nil {
		return r, err
	}
	g := &game{o: o, ctx: ctx, byQPN: map[ib.QPN]*player{}}
	if err := g.open(dev, port.LID, gid, &objects); err != nil {
		return r, err
	}
	if err := g.meet(&objects); err != nil {
		return r, err
	}
	start := time.Now()
	if err := g.play(); err != nil {
		return r, err
	}
	r = pingPongResult{dev.Name(), g.players[0].qp.Path(), o.size, o.iters, g.done.events, time.Since(start)}
	if o.beforeClose != nil {
		o.beforeClose()
	}
	return r, nil
}

// A game is the state of a run. Messages lie in slots of one region. The client sends from one slot and receives the answer
// in another; the server sends back the very slot that it has received in.
type game struct {
	o    *pingPong
	ctx  context.Context
	mem  *mr.MR
	done *completions
	srq  *qp.SRQ // nil: each queue pair has its own receives

	players []*player
	byQPN   map[ib.QPN]*player

	free     []int // slots that nothing uses
	posted   int   // receives that are posted
	sent     int   // messages whose send has completed
	received int
	content  uint64 // counts the contents that the client has made

	recvs []ib.RecvWR // reused
}

// A player is one queue pair with its ball.
type player struct {
	qp   *qp.QP
	mine qp.Endpoint
	to   qp.Endpoint
	ah   *verbs.AH // UD

	sending bool // a send has not completed
	waiting bool // a message of the peer is awaited
	out     int  // the slot of the latest send, which the client compares with the answer; -1: none
	in      int  // the slot of the latest message, which the server has not sent back yet; -1: none
}

// slotSize is how far slots are apart: a message behind the GRH that a datagram brings.
func (g *game) slotSize() int { return (ib.GRHLen + g.o.size + 63) &^ 63 }

// header is how many bytes of a slot precede the message.
func (g *game) header() int {
	if g.o.service == ud {
		return ib.GRHLen
	}
	return 0
}

func (g *game) slot(i int) []byte {
	at := i * g.slotSize()
	return g.mem.Bytes()[at : at+g.header()+g.o.size]
}

// message is the part of a slot that the peer sees.
func (g *game) message(i int) []byte { return g.slot(i)[g.header():] }

// open makes all objects, and posts the receives.
func (g *game) open(dev *verbs.Context, lid ib.LID, gid ib.GID, objects *closers) (err error) {
	o := g.o
	pd, err := dev.AllocPD()
	if err != nil {
		return err
	}
	objects.add(pd)
	slots := o.rxDepth + 2*o.numQP // besides all receives, one that is sent and one that waits for it
	if g.mem, err = mr.Alloc(pd, slots*g.slotSize(), ib.AccessLocalWrite); err != nil {
		return err
	}
	objects.add(g.mem)
	for i := range slots {
		g.free = append(g.free, slots-1-i)
	}
	if g.done, err = newCompletions(dev, o.rxDepth+o.numQP, o.events, objects); err != nil {
		return err
	}
	cfg := qp.Config{Type: ib.RC, SendCQ: g.done.cq, SendDepth: 1, RecvDepth: o.rxDepth, SendSGE: 1}
	switch o.service {
	case uc:
		cfg.Type = ib.UC
	case ud:
		cfg.Type = ib.UD
	case srq:
		if g.srq, err = qp.NewSRQ(pd, qp.SRQConfig{Depth: o.rxDepth}); err != nil {
			return err
		}
		objects.add(g.srq)
		cfg.SRQ, cfg.RecvDepth = g.srq, 0
	}
	for range o.numQP {
		q, err := qp.New(pd, &cfg)
		if err != nil {
			return err
		}
		objects.add(q)
		mine := qp.Endpoint{GID: gid, LID: lid, QPN: q.QPN(), PSN: qp.RandomPSN()}
		p := &player{qp: q, mine: mine, waiting: true, out: -1, in: -1}
		if o.service == ud {
			err = q.ActivateUD(g.ctx, o.ibPort, udKey, p.mine.PSN)
		} else {
			err = q.Init(g.ctx, o.ibPort, 0)
		}
		if err != nil {
			return err
		}
		g.players = append(g.players, p)
		g.byQPN[q.QPN()] = p
		g.print("local address: ", p.mine)
	}
	return g.postReceives()
}

func (g *game) print(what string, a qp.Endpoint) {
	if g.o.out != nil {
		fmt.Fprintf(g.o.out, "  %s LID 0x%04x, QPN 0x%06x, PSN 0x%06x, GID %s\n",
			what, uint16(a.LID), uint32(a.QPN), uint32(a.PSN), a.GID)
	}
}

// meet exchanges addresses with the peer and connects the queue pairs.
func (g *game) meet(objects *closers) error {
	mine := make([]qp.Endpoint, len(g.players))
	for i, p := range g.players {
		mine[i] = p.mine
	}
	slots := 1
	if g.o.service == srq {
		slots = srqSlots
	}
	connect := func(theirs []qp.Endpoint) error {
		for i, p := range g.players {
			p.to = theirs[i]
			g.print("remote address:", p.to)
			if err := g.connect(p, objects); err != nil {
				return err
			}
		}
		return nil
	}
	if g.o.server == "" {
		c, err := accept(g.ctx, g.o.listener, g.o.port)
		if err != nil {
			return err
		}
		defer c.Close()
		return serverExchange(c, mine, slots, connect)
	}
	c, err := dial(g.ctx, g.o.server, g.o.port)
	if err != nil {
		return err
	}
	defer c.Close()
	theirs, err := clientExchange(c, mine, slots)
	if err != nil {
		return err
	}
	return connect(theirs)
}

// connect uses the numbers of the C programs where they name any.
func (g *game) connect(p *player, objects *closers) (err error) {
	o := g.o
	sgid := max(o.gidIndex, 0)
	if o.service == ud {
		p.ah, err = p.qp.PD().NewAH(ib.AHAttr{DGID: p.to.GID, SGIDIndex: sgid, HopLimit: 64, DLID: p.to.LID, SL: o.sl,
			Port: o.ibPort})
		if err == nil {
			objects.add(p.ah)
		}
		return err
	}
	return p.qp.Connect(g.ctx, qp.ConnectParams{Remote: p.to, LocalPSN: p.mine.PSN, SGIDIndex: sgid, MTU: ib.MTUFor(o.mtu),
		SL: o.sl, HopLimit: 1, AckTimeout: 67 * time.Millisecond, RetryCount: 7, RNRRetry: 7,
		MinRNRTimer: 640 * time.Microsecond, MaxRdAtomic: 1, MaxDestRdAtomic: 1})
}
