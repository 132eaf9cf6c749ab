package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The examples of rdma-core introduce their queue pairs over TCP, each by 52 bytes: LID, QPN, starting PSN and GID in hex
// digits, a colon between them, and a NUL.
//
//	client                          server
//	its addresses             ->
//	                                connects its queue pairs
//	                          <-    its addresses
//	"done" and a NUL          ->
//	connects its queue pairs        may receive from now on; sends only in answer
//
// There is one address, or with a shared receive queue always 256, of which those of the queue pairs that are used come
// first and the rest is zero. Both close the TCP connection then. The programs read an address, and the last word, by one
// read(2) each, so each is written at once.
const (
	addressLen = len("0000:000000:000000:00000000000000000000000000000000\x00")
	srqSlots   = 256
	lastWord   = "done\x00"
)

// encodeAddress appends the 52 bytes that introduce e.
func encodeAddress(b []byte, e qp.Endpoint) []byte {
	return fmt.Appendf(b, "%04x:%06x:%06x:%s\x00", uint16(e.LID), uint32(e.QPN), uint32(e.PSN), hex.EncodeToString(e.GID[:]))
}

var errAddress = errors.New("not an address as rdma-core's examples send it")

// decodeAddress is the reverse of encodeAddress. b comes from the peer and may be anything.
func decodeAddress(b []byte) (e qp.Endpoint, err error) {
	bad := func() (qp.Endpoint, error) { return qp.Endpoint{}, fmt.Errorf("%w: %q", errAddress, b) }
	if len(b) != addressLen || b[4] != ':' || b[11] != ':' || b[18] != ':' || b[addressLen-1] != 0 {
		return bad()
	}
	number := func(digits []byte) uint64 {
		v, e := strconv.ParseUint(string(digits), 16, 32)
		if e != nil {
			err = e
		}
		return v
	}
	e.LID = ib.LID(number(b[:4]))
	e.QPN = ib.QPN(number(b[5:11]))
	e.PSN = ib.PSN(number(b[12:18]))
	if n, e2 := hex.Decode(e.GID[:], b[19:addressLen-1]); e2 != nil || n != len(e.GID) || err != nil {
		return bad()
	}
	return e, nil
}

// writeAddresses sends mine and zero addresses up to slots.
func writeAddresses(c net.Conn, mine []qp.Endpoint, slots int) error {
	b := make([]byte, 0, slots*addressLen)
	for i := range slots {
		var e qp.Endpoint
		if i < len(mine) {
			e = mine[i]
		}
		b = encodeAddress(b, e)
	}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("sending the own address: %w", err)
	}
	return nil
}

// readAddresses receives slots addresses and returns the first n.
func readAddresses(c net.Conn, n, slots int) ([]qp.Endpoint, error) {
	b := make([]byte, slots*addressLen)
	if _, err := io.ReadFull(c, b); err != nil {
		return nil, fmt.Errorf("receiving the peer's address: %w", err)
	}
	var theirs []qp.Endpoint
	for i := range slots {
		e, err := decodeAddress(b[i*addressLen : (i+1)*addressLen])
		if err != nil {
			return nil, err
		}
		if i >= n {
			continue
		}
		if e.QPN == 0 {
			return nil, fmt.Errorf("the peer has only %d queue pairs, this side %d", i, n)
		}
		theirs = append(theirs, e)
	}
	return theirs, nil
}

// clientExchange introduces mine to the server at the other end of c, and returns the server's queue pairs.
func clientExchange(c net.Conn, mine []qp.Endpoint, slots int) ([]qp.Endpoint, error) {
	if err := writeAddresses(c, mine, slots); err != nil {
		return nil, err
	}
	theirs, err := readAddresses(c, len(mine), slots)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, lastWord); err != nil {
		return nil, fmt.Errorf("ending the exchange: %w", err)
	}
	return theirs, nil
}

// serverExchange learns of the client's queue pairs, calls connect with them, and then introduces mine: a client sends as
// soon as it knows them.
func serverExchange(c net.Conn, mine []qp.Endpoint, slots int, connect func(theirs []qp.Endpoint) error) error {
	theirs, err := readAddresses(c, len(mine), slots)
	if err != nil {
		return err
	}
	if err := connect(theirs); err != nil {
		return err
	}
	if err := writeAddresses(c, mine, slots); err != nil {
		return err
	}
	word := make([]byte, len(lastWord))
	if _, err := io.ReadFull(c, word); err != nil {
		return fmt.Errorf("waiting for the end of the exchange: %w", err)
	}
	if string(word) != lastWord {
		return fmt.Errorf("the client ended the exchange with %q instead of %q", word, lastWord)
	}
	return nil
}

// dialPatience is how long a server that does not listen yet is waited for, so that both sides can be started at once.
const dialPatience = 10 * time.Second

// dial connects to a server. The connection is closed when ctx ends.
func dial(ctx context.Context, host string, port int) (net.Conn, error) {
	deadline := time.Now().Add(dialPatience)
	for {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return bound(ctx, c), nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) || time.Now().After(deadline) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// accept takes one client and closes l, which is nil for one on port. The connection is closed when ctx ends.
func accept(ctx context.Context, l net.Listener, port int) (net.Conn, error) {
	if l == nil {
		var lc net.ListenConfig
		var err error
		if l, err = lc.Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(port))); err != nil {
			return nil, err
		}
	}
	defer l.Close()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	c, err := l.Accept()
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("waiting for a client: %w", err)
	}
	return bound(ctx, c), nil
}

// bound returns c, made to end with ctx.
func bound(ctx context.Context, c net.Conn) net.Conn {
	return &boundConn{c, context.AfterFunc(ctx, func() { c.Close() })}
}

type boundConn struct {
	net.Conn
	stop func() bool
}

func (c *boundConn) Close() error {
	c.stop()
	return c.Conn.Close()
}
