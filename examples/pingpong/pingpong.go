package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/ringside-rdma/ringside/transport"
)

// echo answers every message of one connection with the same bytes, until the peer is done.
func echo(ctx context.Context, c *transport.Conn) error {
	for {
		err := c.Recv(ctx, func(m *transport.Message) error {
			return c.Send(ctx, m.Bytes()) // m is lent until we return, so Send may read it
		})
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, transport.ErrPeerClosed): // the latter if it does not wait for the answer
			return c.Close()
		case err != nil:
			c.Close()
			return err
		}
	}
}

// serve echoes for one client after the other, clients of them, and returns the first one's error that has one. 0 clients are
// for ever: then errors go to stderr.
func serve(ctx context.Context, l *transport.Listener, clients int, stderr io.Writer) error {
	for n := 0; clients == 0 || n < clients; n++ {
		c, err := l.Accept(ctx)
		if err != nil {
			return err
		}
		if err := echo(ctx, c); err != nil {
			if clients > 0 || ctx.Err() != nil {
				return err
			}
			fmt.Fprintf(stderr, "pingpong: client %v: %v\n", c.RemoteAddr(), err)
		}
	}
	return nil
}

// result is what ping measured.
type result struct {
	size, rounds int
	path         transport.PathInfo
	rtt          *hdrhistogram.Histogram // nanoseconds of a round trip
	elapsed      time.Duration
}

// ping sends a message of size bytes and waits for it to come back, rounds times after some warm-up.
func ping(ctx context.Context, c *transport.Conn, size, rounds int) (*result, error) {
	r := &result{size: size, rounds: rounds, path: c.Path(), rtt: hdrhistogram.New(1, int64(10*time.Second), 3)}
	msg := make([]byte, size)
	check := func(m *transport.Message) error {
		if got := m.Bytes(); len(got) != size || size > 0 && got[size-1] != msg[size-1] {
			return fmt.Errorf("a message of %d bytes came back as %d other ones", size, len(got))
		}
		return nil
	}
	var start time.Time
	for i := -min(rounds/10, 1000); i < rounds; i++ {
		if i == 0 {
			start = time.Now()
		}
		if size > 0 {
			msg[size-1] = byte(i)
		}
		t := time.Now()
		if err := c.Send(ctx, msg); err != nil {
			return nil, err
		}
		if err := c.Recv(ctx, check); err != nil {
			return nil, err
		}
		if i >= 0 {
			r.rtt.RecordValue(min(int64(time.Since(t)), r.rtt.HighestTrackableValue()))
		}
	}
	r.elapsed = time.Since(start)
	return r, nil
}

func (r *result) print(w io.Writer) {
	us := func(v int64) float64 { return float64(v) / 1000 }
	fmt.Fprintf(w, "device %s, path %s\n", r.path.Device, r.path.Rung)
	fmt.Fprintf(w, "%d round trips of %d bytes in %.1f ms\n", r.rounds, r.size, r.elapsed.Seconds()*1000)
	fmt.Fprintf(w, "round trip: p50 %.2f us, p90 %.2f us, p99 %.2f us, p99.9 %.2f us, max %.2f us\n",
		us(r.rtt.ValueAtQuantile(50)), us(r.rtt.ValueAtQuantile(90)), us(r.rtt.ValueAtQuantile(99)),
		us(r.rtt.ValueAtQuantile(99.9)), us(r.rtt.Max()))
}
