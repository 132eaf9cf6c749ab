package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// work is what is measured.
func (s *perfSide) work() error {
	o := s.o
	switch {
	case o.verb == "send" && !o.bw:
		return s.sendsInTurn()
	case o.verb == "write" && !o.bw:
		return s.writesInTurn()
	case s.talk.client:
		return s.stream()
	case o.verb == "send":
		return s.sink()
	}
	return nil // the client does it all
}

// sendsInTurn exchanges messages: the client sends one, and each side answers.
func (s *perfSide) sendsInTurn() error {
	for s.done < s.o.iters || s.received < s.o.iters {
		ahead := 0
		if s.talk.client {
			ahead = 1
		}
		if s.sent < s.o.iters && s.sent < s.received+ahead && s.done == s.sent {
			if err := s.post(1); err != nil {
				return err
			}
		}
		if err := s.take(s.ctx); err != nil {
			return err
		}
	}
	return nil
}

// stream posts requests, as many at a time as there may be.
func (s *perfSide) stream() error {
	for s.done < s.o.iters {
		if n := min(s.o.iters-s.sent, s.o.txDepth-(s.sent-s.done)); n > 0 {
			if err := s.post(n); err != nil {
				return err
			}
		}
		if err := s.take(s.ctx); err != nil {
			return err
		}
	}
	return nil
}

// sink takes messages: all, or if they are datagrams, those that come until the client says that it has sent all.
func (s *perfSide) sink() error {
	ctx := s.ctx
	if s.o.typ != ib.RC {
		until, cancel := context.WithCancel(s.ctx)
		defer cancel()
		ctx, s.gone = until, make(chan error, 1)
		go func() {
			_, err := io.ReadFull(s.talk.conn, make([]byte, keysLen))
			s.gone <- err
			cancel()
		}()
	}
	for s.received < s.o.iters {
		err := s.take(ctx)
		if err == nil {
			continue
		}
		if s.ctx.Err() != nil || ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
			return err
		}
		// What was sent has left the client, and there is no network in between to hold it up.
		for s.received < s.o.iters {
			s.dev.Progress()
			if n, err := s.takeNow(); err != nil {
				return err
			} else if n == 0 {
				s.lost = s.o.iters - s.received
				return nil
			}
		}
	}
	return nil
}

// writesInTurn is write_lat: the last byte of each message is its number, and says that it has come. The server begins.
func (s *perfSide) writesInTurn() error {
	o, size := s.o, s.o.size
	mem, window := s.mem.Bytes()[:size], s.window(0)
	for i := range o.iters {
		if s.talk.client {
			if err := s.await(window, byte(i+1)); err != nil {
				return err
			}
		}
		mem[size-1] = byte(i + 1)
		if err := s.post(1); err != nil {
			return err
		}
		for s.done < s.sent {
			if err := s.take(s.ctx); err != nil {
				return err
			}
		}
		if !s.talk.client {
			if err := s.await(window, byte(i+1)); err != nil {
				return err
			}
		}
	}
	return nil
}

// await waits until the last byte of a window is n, and with check compares the others: the peer's are 0.
func (s *perfSide) await(window []byte, n byte) error {
	last := &window[len(window)-1]
	for spins := 1; loadByte(last) != n; spins++ {
		s.dev.Progress()
		if spins%64 == 0 {
			runtime.Gosched()
			if err := s.ctx.Err(); err != nil {
				return fmt.Errorf("waiting for message %d: %w", s.received+1, err)
			}
		}
	}
	s.received++
	if !s.o.check {
		return nil
	}
	want := make([]byte, len(window))
	want[len(want)-1] = n
	// Within a packet nothing promises that the last byte is written last.
	var err error
	for range 1000 {
		if err = differ(window, want); err == nil {
			for i := range len(window) - 1 { // before the answer, after which the peer may write again
				window[i] = 0xe5
			}
			return nil
		}
		s.dev.Progress()
		runtime.Gosched()
	}
	return fmt.Errorf("message %d: %w", s.received, err)
}

// loadByte reads what the NIC writes.
//
//go:norace
//go:noinline
func loadByte(p *byte) byte { return *p }

// post posts the next n requests in one call.
func (s *perfSide) post(n int) error {
	o := s.o
	s.wrs = s.wrs[:0]
	for i := s.sent; i < s.sent+n; i++ {
		at := s.layout.at(i)
		wr := ib.SendWR{ID: sendID | uint64(i), Flags: ib.SendSignaled}
		switch o.verb {
		case "send":
			wr.Opcode = ib.OpSend
		case "write":
			wr.Opcode = ib.OpRDMAWrite
		case "read":
			wr.Opcode = ib.OpRDMARead
		default:
			wr.Opcode, wr.CompareAdd = ib.OpAtomicFetchAdd, 1
		}
		switch {
		case o.gets():
			for k := range s.slot(i) {
				s.slot(i)[k] = 0xe5
			}
			wr.SGEs = []ib.SGE{s.mem.SGE(s.slotAt(i), o.size)}
		case o.size <= s.qp.Cap().MaxInline:
			wr.Inline = s.mem.Bytes()[at : at+o.size]
		default:
			wr.SGEs = []ib.SGE{s.mem.SGE(at, o.size)}
		}
		if o.verb != "send" {
			wr.RemoteAddr, wr.RKey = s.theirs.window.Addr+uint64(at), s.theirs.window.RKey
		} else if o.typ == ib.UD {
			wr.AH, wr.RemoteQPN, wr.RemoteQKey = s.ah.Num(), s.theirs.at.QPN, udKey
		}
		s.wrs = append(s.wrs, wr)
	}
	k, err := s.qp.PostSend(s.wrs)
	s.sent += k
	return err
}

// postReceives posts as many receives as there may be, and will be needed.
func (s *perfSide) postReceives() error {
	s.recvs = s.recvs[:0]
	for n := min(s.o.iters-s.posted, s.o.rxDepth-(s.posted-s.received)); n > 0; n-- {
		i := s.posted + len(s.recvs)
		s.recvs = append(s.recvs, ib.RecvWR{ID: uint64(i), SGEs: []ib.SGE{s.mem.SGE(s.slotAt(i), len(s.slot(i)))}})
	}
	if len(s.recvs) == 0 {
		return nil
	}
	n, err := s.qp.PostRecv(s.recvs)
	s.posted += n
	return err
}

// take waits for completions, and deals with them, also with those that come as ctx ends.
func (s *perfSide) take(ctx context.Context) error {
	wcs, err := s.cq.next(ctx)
	if len(wcs) > 0 {
		if err := s.completed(wcs); err != nil {
			return err
		}
	}
	return err
}

// takeNow is take of what there is. It returns how much that was.
func (s *perfSide) takeNow() (int, error) {
	n, err := s.cq.cq.Poll(s.cq.wcs)
	if err != nil {
		return n, err
	}
	return n, s.completed(s.cq.wcs[:n])
}

func (s *perfSide) completed(wcs []ib.WC) error {
	for i := range wcs {
		wc := &wcs[i]
		if err := verbs.CheckWC("perftest", wc); err != nil {
			return err
		}
		if wc.ID&sendID != 0 {
			if err := s.completedSend(wc); err != nil {
				return err
			}
		} else if err := s.arrived(wc); err != nil {
			return err
		}
	}
	if s.received < s.posted { // there are receives
		return s.postReceives()
	}
	return nil
}

// completedSend takes the completion of a request: they come in order.
func (s *perfSide) completedSend(wc *ib.WC) error {
	i := s.done
	if wc.ID != sendID|uint64(i) || i >= s.sent || wc.Opcode != ib.WCOpcodeOf(s.wrs[0].Opcode) {
		return fmt.Errorf("an unexpected completion instead of that of request %d: %+v", i, *wc)
	}
	s.done++
	if !s.o.gets() {
		return nil
	}
	if int(wc.ByteLen) != s.o.size {
		return fmt.Errorf("%v has %d bytes instead of %d", wc.Opcode, wc.ByteLen, s.o.size)
	}
	if !s.o.check {
		return nil
	}
	at := s.layout.half() + s.layout.at(i)
	if err := s.learn(s.slot(i), at); err != nil {
		return err
	}
	want := s.content[at : at+s.o.size]
	if err := differ(s.slot(i), want); err != nil {
		return fmt.Errorf("%v %d: %w", wc.Opcode, i+1, err)
	}
	if s.o.verb == "atomic" { // the next one finds one more
		binary.NativeEndian.PutUint64(want, binary.NativeEndian.Uint64(want)+1)
	}
	return nil
}

// arrived takes a message.
func (s *perfSide) arrived(wc *ib.WC) error {
	i := s.received
	switch {
	case int(wc.ID) != i || i >= s.posted || wc.Opcode != ib.WCRecv || wc.Flags&(ib.WCWithImm|ib.WCWithInv) != 0:
		return fmt.Errorf("not the completion of receive %d: %+v", i, *wc)
	case int(wc.ByteLen) != s.header()+s.o.size:
		return fmt.Errorf("received %d bytes instead of %d", wc.ByteLen, s.header()+s.o.size)
	case s.o.typ == ib.UD && (wc.Flags&ib.WCGRH == 0 || wc.SrcQPN != s.theirs.at.QPN):
		return fmt.Errorf("not a datagram of QP %#x with a GRH: %+v", s.theirs.at.QPN, *wc)
	}
	s.received++
	if !s.o.check {
		return nil
	}
	got := s.slot(i)[s.header():]
	places := []int{s.layout.at(i)}
	if s.o.typ != ib.RC { // any may be missing before it
		places = places[:0]
		for k := range s.layout.places() {
			places = append(places, s.layout.at(i+k))
		}
	}
	if err := s.learn(got, places...); err != nil {
		return err
	}
	var err error
	for _, at := range places {
		if err = differ(got, s.content[at:at+s.o.size]); err == nil {
			return nil
		}
	}
	return fmt.Errorf("message %d: %w", i+1, err)
}

// learn finds out what is in the peer's memory, given a message from one of the places.
func (s *perfSide) learn(sample []byte, places ...int) (err error) {
	if s.content == nil {
		s.content, err = perftestContent(s.layout.whole(), sample, places, time.Now())
	}
	return err
}

// checkWindow looks at the memory that the client has changed, or should not have.
func (s *perfSide) checkWindow() error {
	half, l := s.mem.Bytes()[s.layout.half():s.layout.whole()], s.layout
	want := append([]byte(nil), s.was[l.half():]...)
	for i := range min(s.o.iters, l.places()) {
		at := l.at(i)
		switch s.o.verb {
		case "write":
			if err := s.learn(s.window(0), 0); err != nil {
				return err
			}
			copy(want[at:at+s.o.size], s.content[at:])
		case "atomic":
			n := (s.o.iters - i + l.places() - 1) / l.places() // of the atomics, those that go to this cell
			cell := want[at : at+8]
			binary.NativeEndian.PutUint64(cell, binary.NativeEndian.Uint64(cell)+uint64(n))
		}
	}
	if err := differ(half, want); err != nil {
		return fmt.Errorf("memory after the client's requests: %w", err)
	}
	return nil
}
