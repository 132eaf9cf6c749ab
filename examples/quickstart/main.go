// Quickstart sends a message and prints the answer: a server and a client in one process, on the best device there is.
package main

import (
	"context"
	"fmt"
	"log"
	"sync"

	"github.com/ringside-rdma/ringside/transport"
)

func main() {
	ctx := context.Background()
	l, err := transport.Listen(ctx, "127.0.0.1:0", nil)
	check(err)
	var server sync.WaitGroup
	server.Go(func() { serve(ctx, l) })
	c, err := transport.Dial(ctx, l.Addr().String(), nil)
	check(err)
	check(c.Send(ctx, []byte("world")))
	check(c.Recv(ctx, func(m *transport.Message) error { // m is lent until the function returns
		fmt.Printf("%s (device %s, path %s)\n", m.Bytes(), c.Path().Device, c.Path().Rung)
		return nil
	}))
	check(c.Close())
	server.Wait()
	check(l.Close())
}

func serve(ctx context.Context, l *transport.Listener) {
	c, err := l.Accept(ctx)
	check(err)
	check(c.Recv(ctx, func(m *transport.Message) error {
		return c.Send(ctx, append([]byte("hello, "), m.Bytes()...))
	}))
	check(c.Close()) // each connection, also one that its peer has closed
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
