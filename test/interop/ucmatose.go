package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// ucmatose is a run of librdmacm's ucmatose: some connections, on each some messages from the server, after all of them as
// many from the client, and the end of the connections, which the server begins.
//
// The C program has one buffer a connection, for all messages, sent and received. So those of a C server are all the same, and
// a client, of either kind, sends back the last one that it has received, as often as there are messages.
//
// That the server sends first is against iWARP's rules (RFC 5044, section 7.1.2), but the C program does it, and siw bears it in most
// cases: not where the first message comes with the reply to the request to connect, or before the client has looked at that.
type ucmatose struct {
	cmSide
	connections int
	count       int  // messages each way on each connection
	size        int  // bytes of a message; 0: as if count was 0
	numbered    bool // client: the server's messages differ, as this program's do
}

func ucmatoseDefaults() ucmatose {
	return ucmatose{cmSide: cmSide{port: 7471}, connections: 1, count: 10, size: 100}
}

// A ucmatoseResult counts what was done.
type ucmatoseResult struct {
	device      string
	connections int
	count       int
	size        int
	flushed     int // replies of the client whose acknowledgement came after the server's disconnect, or never
	events      int // waits for completion events; 0 when polling
}

func (r ucmatoseResult) String() string {
	s := fmt.Sprintf("%s: %d connections, each %d messages of %d bytes both ways", r.device, r.connections, r.count, r.size)
	if r.flushed > 0 {
		s += fmt.Sprintf(", %d replies without acknowledgement", r.flushed)
	}
	if r.events > 0 {
		s += fmt.Sprintf(", %d events", r.events)
	}
	return s
}

// The most memory that a connection may take on this side: unlike the C program's, each message has a buffer.
const ucmatoseMax = 1 << 30

// run makes the connections and exchanges the messages. It fails if anything did not arrive as it was sent.
func (o *ucmatose) run(ctx context.Context) (r ucmatoseResult, err error) {
	var objects closers
	defer objects.closeAll(&err)
	if err := o.cmSide.usable(); err != nil {
		return r, err
	}
	switch {
	case o.connections < 1:
		return r, fmt.Errorf("%d connections", o.connections)
	case o.count < 0 || o.size < 0:
		return r, fmt.Errorf("%d messages of %d bytes", o.count, o.size)
	case o.size > 0 && o.count > ucmatoseMax/2/o.size:
		return r, fmt.Errorf("%d messages of %d bytes: all of them must fit into %d bytes", o.count, o.size, ucmatoseMax/2)
	}
	dev, err := verbs.Open(o.device)
	if err != nil {
		return r, err
	}
	objects.add(dev)
	pd, err := dev.AllocPD()
	if err != nil {
		return r, err
	}
	objects.add(pd)
	c := &conversation{o: o, ctx: ctx, pd: pd, count: o.count}
	if o.size == 0 {
		c.count = 0
	}
	if o.remote == "" {
		err = c.serve(dev, &objects)
	} else {
		err = c.answer(&objects)
	}
	if err != nil {
		return r, err
	}
	r = ucmatoseResult{device: dev.Name(), connections: len(c.talkers), count: c.count, size: o.size}
	for _, t := range c.talkers {
		r.events += t.done.events
		r.flushed += t.flushed
	}
	return r, nil
}

// A conversation is the state of a run.
type conversation struct {
	o       *ucmatose
	ctx     context.Context
	pd      *verbs.PD
	count   int
	talkers []*talker
}

// A talker is one connection. Its memory has a slot for each message that is received, and then one for each that is sent.
type talker struct {
	*link
	c        *conversation
	mem      *mr.MR // nil without messages
	sent     int    // messages whose send has completed
	received int
	flushed  int // of those sent: by the end of the connection
}

// slot is the place of a message.
func (t *talker) slot(i int) []byte { return t.mem.Bytes()[i*t.c.o.size : (i+1)*t.c.o.size] }

func (t *talker) sge(slot int) []ib.SGE { return []ib.SGE{t.mem.SGE(slot*t.c.o.size, t.c.o.size)} }

// add makes a connection by connect, which is accept or dial.
func (c *conversation) add(objects *closers, connect func(linkMaker, qp.CMParams) (*link, error)) error {
	t := &talker{c: c}
	if c.count > 0 {
		var err error
		if t.mem, err = mr.Alloc(c.pd, 2*c.count*c.o.size, ib.AccessLocalWrite); err != nil {
			return err
		}
		objects.add(t.mem)
	}
	open := func(objects *closers) (n *link, err error) {
		depth := max(c.count, 1)
		cfg := qp.Config{Type: ib.RC, SendDepth: depth, RecvDepth: depth, SendSGE: 1}
		if t.link, err = c.o.newLink(c.ctx, c.pd, cfg, 0, objects); err != nil {
			return nil, err
		}
		wrs := make([]ib.RecvWR, c.count)
		for i := range wrs {
			wrs[i] = ib.RecvWR{ID: uint64(i), SGEs: t.sge(i)}
		}
		_, err = t.qp.PostRecv(wrs)
		return t.link, err
	}
	var err error
	t.link, err = connect(open, qp.CMParams{MaxRdAtomic: 1, MaxDestRdAtomic: 1, RetryCount: 5}) // as the C program has it
	if err == nil {
		c.talkers = append(c.talkers, t)
	}
	return err
}

// each calls fn for all connections, one after the other.
func (c *conversation) each(what string, fn func(*talker) error) error {
	for i, t := range c.talkers {
		if err := fn(t); err != nil {
			return fmt.Errorf("%s on connection %d of %d, with %d of %d messages sent and %d received: %w",
				what, i+1, len(c.talkers), t.sent, c.count, t.received, err)
		}
	}
	return nil
}

// serve is the server.
func (c *conversation) serve(dev *verbs.Context, objects *closers) error {
	l, err := c.o.listen(c.ctx, dev, c.o.connections, objects)
	if err != nil {
		return err
	}
	for range c.o.connections {
		err := c.add(objects, func(open linkMaker, p qp.CMParams) (*link, error) { return c.o.accept(c.ctx, l, open, p, objects) })
		if err != nil {
			return err
		}
	}
	if err := c.each("sending", (*talker).talk); err != nil {
		return err
	}
	if err := c.each("receiving", func(t *talker) error {
		if err := t.until(c.count, c.count); err != nil {
			return err
		}
		return t.checkReplies()
	}); err != nil {
		return err
	}
	// First all of them, as the C program does.
	if err := c.each("disconnecting", func(t *talker) error { return t.conn.Disconnect() }); err != nil {
		return err
	}
	return c.each("disconnecting", func(t *talker) error { return t.over(c.ctx) })
}

// answer is the client.
func (c *conversation) answer(objects *closers) error {
	for range c.o.connections {
		err := c.add(objects, func(open linkMaker, p qp.CMParams) (*link, error) { return c.o.dial(c.ctx, open, p, objects) })
		if err != nil {
			return err
		}
	}
	if err := c.each("receiving", func(t *talker) error {
		if err := t.until(0, c.count); err != nil {
			return err
		}
		return t.checkMessages()
	}); err != nil {
		return err
	}
	if err := c.each("sending", (*talker).reply); err != nil {
		return err
	}
	if err := c.each("sending", func(t *talker) error { return t.until(c.count, c.count) }); err != nil {
		return err
	}
	return c.each("waiting for the end", func(t *talker) error { return t.over(c.ctx) })
}

// talk sends the server's messages.
func (t *talker) talk() error {
	wrs := make([]ib.SendWR, t.c.count)
	for i := range wrs {
		slot := t.c.count + i
		fillMessage(t.slot(slot), i)
		wrs[i] = ib.SendWR{ID: sendID | uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: t.sge(slot)}
	}
	_, err := t.qp.PostSend(wrs)
	return err
}

// fillMessage makes the i-th message of a server, from 0.
func fillMessage(b []byte, i int) {
	s := splitMix(i + 1)
	s.fill(b)
}

// reply sends the client's messages.
func (t *talker) reply() error {
	wrs := make([]ib.SendWR, t.c.count)
	for i := range wrs {
		wrs[i] = ib.SendWR{ID: sendID | uint64(i), Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: t.sge(t.c.count - 1)}
	}
	_, err := t.qp.PostSend(wrs)
	return err
}

// until takes completions until so many messages were sent and received.
func (t *talker) until(sent, received int) error {
	for t.sent < sent || t.received < received {
		wcs, err := t.done.next(t.c.ctx)
		if err != nil {
			return err
		}
		for i := range wcs {
			if err := t.complete(&wcs[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *talker) complete(wc *ib.WC) error {
	sending := wc.ID&sendID != 0
	op := "receiving"
	if sending {
		op = "sending"
	}
	if err := verbs.CheckWC(op, wc); err != nil {
		// A server disconnects when it has all replies, which it may do before the client's device has heard so.
		if sending && t.c.o.remote != "" && errors.Is(err, ib.WCFlushErr) {
			t.sent++
			t.flushed++
			return nil
		}
		return err
	}
	switch {
	case wc.QPN != t.qp.QPN():
		return fmt.Errorf("a completion of another queue pair than %#x: %+v", t.qp.QPN(), *wc)
	case sending && wc.Opcode == ib.WCSend && wc.ID == sendID|uint64(t.sent) && t.sent < t.c.count:
		t.sent++
	case !sending && wc.Opcode == ib.WCRecv && wc.ID == uint64(t.received) && wc.Flags&(ib.WCWithImm|ib.WCWithInv) == 0:
		if int(wc.ByteLen) != t.c.o.size {
			return fmt.Errorf("received %d bytes instead of %d", wc.ByteLen, t.c.o.size)
		}
		t.received++
	default:
		return fmt.Errorf("an unexpected completion: %+v", *wc)
	}
	return nil
}

// checkReplies compares what the server has received.
func (t *talker) checkReplies() error {
	for i := range t.c.count {
		if err := differ(t.slot(i), t.slot(2*t.c.count-1)); err != nil {
			return fmt.Errorf("reply %d: %w", i+1, err)
		}
	}
	return nil
}

// checkMessages compares what the client has received.
func (t *talker) checkMessages() error {
	if t.c.count == 0 {
		return nil
	}
	want := bytes.Clone(t.slot(0))
	for i := range t.c.count {
		if t.c.o.numbered {
			fillMessage(want, i)
		}
		if err := differ(t.slot(i), want); err != nil {
			return fmt.Errorf("message %d: %w", i+1, err)
		}
	}
	return nil
}
