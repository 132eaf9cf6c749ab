package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// rping is a run of librdmacm's rping. One ping:
//
//	client                                        server
//	where its source is, as a message        ->
//	                                              reads the source, by RDMA READ
//	                                         <-   go ahead
//	where its sink is                        ->
//	                                              writes what it has read to the sink, by RDMA WRITE
//	                                         <-   go ahead
//
// Messages have 16 bytes both ways; nobody looks at those of a go-ahead. The server answers the bytes up to the first NUL and
// that, which of what clients send is all. The client disconnects when it has made its pings.
type rping struct {
	cmSide
	size     int  // bytes of a ping; of the server at least the client's
	count    int  // pings; 0: the client makes them for ever, the server takes any number
	validate bool // compare what arrives; the C program does so as client only
	verbose  bool // print it
}

func rpingDefaults() rping { return rping{cmSide: cmSide{port: 7174}, size: 64} }

// The sizes that the C program takes.
const (
	rpingMin = 23
	rpingMax = 1<<16 - 1
)

// An rpingResult counts what was done.
type rpingResult struct {
	device string
	server bool
	pings  int
	size   int
	events int // waits for completion events; 0 when polling
}

func (r rpingResult) String() string {
	role := "client"
	if r.server {
		role = "server"
	}
	s := fmt.Sprintf("%s: %d pings of up to %d bytes as %s", r.device, r.pings, r.size, role)
	if r.events > 0 {
		s += fmt.Sprintf(", %d events", r.events)
	}
	return s
}

// An advert says where a client's buffer is. On the wire it has 16 bytes, big-endian:
//
//	 0  uint64  address
//	 8  uint32  rkey
//	12  uint32  size in bytes
type advert struct {
	addr uint64
	rkey ib.RKey
	size int
}

const advertLen = 16

// advertOf is the advert of a whole region.
func advertOf(m *mr.MR) advert { return advert{m.Addr(), m.RKey(), m.Len()} }

// encodeAdvert appends the 16 bytes.
func encodeAdvert(b []byte, a advert) []byte {
	b = binary.BigEndian.AppendUint64(b, a.addr)
	b = binary.BigEndian.AppendUint32(b, uint32(a.rkey))
	return binary.BigEndian.AppendUint32(b, uint32(a.size))
}

var errAdvert = errors.New("not an rping client's buffer")

// decodeAdvert is the reverse of encodeAdvert. b comes from the peer and may be anything.
func decodeAdvert(b []byte) (advert, error) {
	if len(b) != advertLen {
		return advert{}, fmt.Errorf("%w: %d bytes instead of %d", errAdvert, len(b), advertLen)
	}
	addr, size := binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[12:])
	if size < 1 || size > rpingMax || addr+uint64(size) < addr {
		return advert{}, fmt.Errorf("%w: %d bytes at %#x", errAdvert, size, addr)
	}
	return advert{addr, ib.RKey(binary.BigEndian.Uint32(b[8:])), int(size)}, nil
}

// fillPing makes the n-th ping, from 0: its number in words, letters that begin with another one each time, and a NUL.
func fillPing(b []byte, n int) {
	const first, letters = 'A', 'z' - 'A' + 1
	at := copy(b, fmt.Sprintf("rdma-ping-%d: ", n))
	for i := at; i < len(b); i++ {
		b[i] = byte(first + (n+i-at)%letters)
	}
	b[len(b)-1] = 0
}

// pongLength returns how many bytes of a ping are answered. It fails if there is no end to them.
func pongLength(ping []byte) (int, error) {
	i := bytes.IndexByte(ping, 0)
	if i < 0 {
		return 0, fmt.Errorf("no NUL in %d bytes that were read", len(ping))
	}
	return i + 1, nil
}

// checkPing compares what was read with the n-th ping.
func checkPing(got []byte, n int) error {
	want := make([]byte, len(got))
	fillPing(want, n)
	return differ(got, want)
}

// run makes the pings, or as server answers those of one client. It fails if one did not arrive, or with validate, not as it
// was sent; and the server if they are not as many as count says.
func (o *rping) run(ctx context.Context) (r rpingResult, err error) {
	var objects closers
	defer objects.closeAll(&err)
	if err := o.cmSide.usable(); err != nil {
		return r, err
	}
	switch {
	case o.size < rpingMin || o.size > rpingMax:
		return r, fmt.Errorf("pings of %d bytes: there are %d to %d", o.size, rpingMin, rpingMax)
	case o.count < 0:
		return r, fmt.Errorf("%d pings", o.count)
	}
	dev, err := verbs.Open(o.device)
	if err != nil {
		return r, err
	}
	objects.add(dev)
	p := &pinger{o: o, ctx: ctx}
	if err := p.open(dev, &objects); err != nil {
		return r, err
	}
	if o.remote == "" {
		err = p.serve()
	} else {
		err = p.ask()
	}
	if err != nil {
		return r, fmt.Errorf("after %d pings: %w", p.pings, err)
	}
	return rpingResult{dev.Name(), o.remote == "", p.pings, o.size, p.done.events}, nil
}

// A pinger is the state of a run.
type pinger struct {
	o   *rping
	ctx context.Context
	*link
	words  *mr.MR // the message that is sent, and the one that is received
	source *mr.MR // client: what the server reads
	sink   *mr.MR // where the peer's bytes arrive

	pings    int             // done
	said     int             // messages sent
	received int             // messages received
	heard    [advertLen]byte // the last of them
	flying   ib.Opcode       // the own request that has not completed: there is one at a time
	flies    bool            // ... if there is one
}

// IDs of work requests.
const (
	pingOwn = 1 + iota
	pingRecv
)

// open makes all objects and connects.
func (p *pinger) open(dev *verbs.Context, objects *closers) (err error) {
	o := p.o
	pd, err := dev.AllocPD()
	if err != nil {
		return err
	}
	objects.add(pd)
	alloc := func(size int, access ib.Access) (m *mr.MR) {
		if err == nil {
			if m, err = mr.Alloc(pd, size, access); err == nil {
				objects.add(m)
			}
		}
		return m
	}
	p.words = alloc(2*advertLen, ib.AccessLocalWrite)
	// The server's needs remote rights for iWARP only, where the answer to a READ is written like the peer's own WRITE.
	p.sink = alloc(o.size, ib.AccessLocalWrite|ib.AccessRemoteWrite)
	var access ib.Access
	if o.remote != "" {
		p.source = alloc(o.size, ib.AccessRemoteRead)
		access = ib.AccessRemoteRead | ib.AccessRemoteWrite
	}
	if err != nil {
		return err
	}
	open := func(objects *closers) (n *link, err error) {
		cfg := qp.Config{Type: ib.RC, SendDepth: 4, RecvDepth: 1, SendSGE: 1}
		if p.link, err = o.newLink(p.ctx, pd, cfg, access, objects); err != nil {
			return nil, err
		}
		return p.link, p.postReceive()
	}
	params := qp.CMParams{MaxRdAtomic: 1, MaxDestRdAtomic: 1} // as the C program has it
	if o.remote != "" {
		p.link, err = o.dial(p.ctx, open, params, objects)
		return err
	}
	l, err := o.listen(p.ctx, dev, 1, objects)
	if err != nil {
		return err
	}
	p.link, err = o.accept(p.ctx, l, open, params, objects)
	return err
}

func (p *pinger) postReceive() error {
	_, err := p.qp.PostRecv([]ib.RecvWR{{ID: pingRecv, SGEs: []ib.SGE{p.words.SGE(advertLen, advertLen)}}})
	return err
}

// say sends a message.
func (p *pinger) say(a advert) error {
	encodeAdvert(p.words.Bytes()[:0], a)
	p.said++
	return p.post(ib.SendWR{Opcode: ib.OpSend, SGEs: []ib.SGE{p.words.SGE(0, advertLen)}})
}

// goAhead is what the server says. The C program's is zeros, too.
var goAhead advert

// post posts a request. The previous one must have completed.
func (p *pinger) post(wr ib.SendWR) error {
	wr.ID, wr.Flags = pingOwn, ib.SendSignaled
	_, err := p.qp.PostSend([]ib.SendWR{wr})
	p.flying, p.flies = wr.Opcode, err == nil
	return err
}

// until takes completions until that many messages of the peer are there, and the own request has completed.
func (p *pinger) until(received int) error {
	for p.received < received || p.flies {
		wcs, err := p.done.next(p.ctx)
		if err != nil {
			return fmt.Errorf("with %d of %d messages received, and the own request complete: %v: %w",
				p.received, received, !p.flies, err)
		}
		for i := range wcs {
			if err := p.complete(&wcs[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pinger) complete(wc *ib.WC) error {
	op := "receiving"
	if wc.ID == pingOwn {
		op = p.flying.String()
	}
	if err := verbs.CheckWC(op, wc); err != nil {
		return err
	}
	switch {
	case wc.QPN != p.qp.QPN():
		return fmt.Errorf("a completion of another queue pair than %#x: %+v", p.qp.QPN(), *wc)
	case wc.ID == pingOwn && p.flies && wc.Opcode == ib.WCOpcodeOf(p.flying):
		p.flies = false
	case wc.ID == pingRecv && wc.Opcode == ib.WCRecv && wc.Flags&(ib.WCWithImm|ib.WCWithInv) == 0:
		if wc.ByteLen != advertLen {
			return fmt.Errorf("a message of %d bytes instead of %d", wc.ByteLen, advertLen)
		}
		p.received++
		copy(p.heard[:], p.words.Bytes()[advertLen:])
		return p.postReceive() // before an answer, to which the peer may have something to say at once
	default:
		return fmt.Errorf("an unexpected completion: %+v", *wc)
	}
	return nil
}

// spoil makes sure that what is in b later has arrived later.
func spoil(b []byte) {
	for i := range b {
		b[i] = 0xe5
	}
}

// ask is the client.
func (p *pinger) ask() error {
	for o := p.o; o.count == 0 || p.pings < o.count; p.pings++ {
		fillPing(p.source.Bytes(), p.pings)
		spoil(p.sink.Bytes())
		for _, m := range []*mr.MR{p.source, p.sink} {
			if err := p.say(advertOf(m)); err != nil {
				return err
			}
			if err := p.until(p.said); err != nil {
				return err
			}
		}
		if o.validate {
			if err := differ(p.sink.Bytes(), p.source.Bytes()); err != nil {
				return err
			}
		}
		p.print("ping data: ", p.sink.Bytes())
	}
	return p.disconnect(p.ctx)
}

// serve is the server.
func (p *pinger) serve() error {
	for ; ; p.pings++ {
		err := p.until(2*p.pings + 1)
		// Between pings the client may go, also before it has acknowledged the last go-ahead: siw calls that a failed operation.
		if errors.Is(err, ib.WCFlushErr) || errors.Is(err, ib.WCLocalQPOpErr) {
			if err := p.over(p.ctx); err != nil {
				return err
			}
			if p.o.count != 0 && p.pings != p.o.count {
				return fmt.Errorf("the client has disconnected, but there should be %d pings", p.o.count)
			}
			return nil
		}
		if err != nil {
			return err
		}
		if p.o.count != 0 && p.pings == p.o.count {
			return fmt.Errorf("the client goes on, but there should be %d pings", p.o.count)
		}
		if err := p.answer(); err != nil {
			return err
		}
	}
}

// answer reads a ping and writes it back.
func (p *pinger) answer() error {
	source, err := decodeAdvert(p.heard[:])
	if err != nil {
		return err
	}
	if source.size > p.o.size {
		return fmt.Errorf("the client's pings have %d bytes, more than %d: the server needs the same size (-S)",
			source.size, p.o.size)
	}
	spoil(p.sink.Bytes())
	if err := p.post(ib.SendWR{Opcode: ib.OpRDMARead, SGEs: []ib.SGE{p.sink.SGE(0, source.size)}, RemoteAddr: source.addr,
		RKey: source.rkey}); err != nil {
		return err
	}
	if err := p.until(p.received); err != nil {
		return err
	}
	ping := p.sink.Bytes()[:source.size]
	if p.o.validate {
		if err := checkPing(ping, p.pings); err != nil {
			return err
		}
	}
	n, err := pongLength(ping)
	if err != nil {
		return err
	}
	p.print("server ping data: ", ping[:n])
	if err := p.say(goAhead); err != nil {
		return err
	}
	if err := p.until(2*p.pings + 2); err != nil {
		return err
	}
	sink, err := decodeAdvert(p.heard[:])
	if err != nil {
		return err
	}
	if n > sink.size {
		return fmt.Errorf("the client wants %d bytes back in %d", n, sink.size)
	}
	if err := p.post(ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{p.sink.SGE(0, n)}, RemoteAddr: sink.addr,
		RKey: sink.rkey}); err != nil {
		return err
	}
	if err := p.until(p.received); err != nil {
		return err
	}
	return p.say(goAhead)
}

// print prints a ping, without its NUL, if the run is verbose.
func (p *pinger) print(what string, ping []byte) {
	if p.o.verbose && p.o.out != nil {
		fmt.Fprintf(p.o.out, "%s%s\n", what, bytes.TrimSuffix(ping, []byte{0}))
	}
}
