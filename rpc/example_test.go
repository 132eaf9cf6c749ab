package rpc_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var device = &transport.Config{Device: transporttest.Device}

// serve starts a server on a free port and returns its address.
func serve(srv *rpc.Server) string {
	l, err := transport.Listen(context.Background(), "127.0.0.1:0", device)
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		if err := srv.Serve(context.Background(), l); !errors.Is(err, rpc.ErrServerClosed) {
			log.Fatal(err)
		}
	}()
	return l.Addr().String()
}

// Bytes in, bytes out: the handler reads the request where it was received, and writes the response where it is sent from.
func Example() {
	const echo rpc.Method = 1
	srv := rpc.NewServer(nil)
	defer srv.Close()
	srv.HandleRaw(rpc.Spec{Number: echo, Inline: true}, func(c *rpc.Call, req []byte) error {
		resp, err := c.Reply(len(req))
		if err != nil {
			return err
		}
		copy(resp, req)
		return nil
	})
	addr := serve(srv)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := rpc.Dial(ctx, addr, device, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	err = client.CallRaw(ctx, echo, []byte("hello"), func(resp []byte) error {
		fmt.Printf("%s\n", resp) // resp is lent until this function returns
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: hello
}

// Protobuf messages, methods with names, and errors with codes.
func ExampleHandle() {
	srv := rpc.NewServer(nil)
	defer srv.Close()
	rpc.Handle(srv, "greeter.Greeter/Hello", func(ctx context.Context, req *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
		if req.Value == "" {
			return nil, rpc.Errorf(rpc.InvalidArgument, "whom shall I greet?")
		}
		return wrapperspb.String("Hello, " + req.Value + "!"), nil
	})
	addr := serve(srv)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := rpc.Dial(ctx, addr, device, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	for _, name := range []string{"world", ""} {
		resp, err := rpc.Invoke[*wrapperspb.StringValue](ctx, client, "greeter.Greeter/Hello", wrapperspb.String(name))
		switch {
		case errors.Is(err, rpc.InvalidArgument):
			fmt.Println(err)
		case err != nil:
			log.Fatal(err)
		default:
			fmt.Println(resp.Value)
		}
	}
	// Output:
	// Hello, world!
	// rpc: InvalidArgument: whom shall I greet?
}

// Many calls in flight from one goroutine.
func ExampleQueue() {
	const upper rpc.Method = 1
	srv := rpc.NewServer(nil)
	defer srv.Close()
	srv.HandleRaw(rpc.Spec{Number: upper, Inline: true}, func(c *rpc.Call, req []byte) error {
		return c.ReplyBytes([]byte(strings.ToUpper(string(req))))
	})
	addr := serve(srv)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := rpc.Dial(ctx, addr, device, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	q, err := client.NewQueue(2)
	if err != nil {
		log.Fatal(err)
	}
	defer q.Close()
	words := []string{"one", "two", "three", "four", "five"}
	results := make([]string, len(words))
	collect := func(tag uint64, resp []byte, err error) {
		if err != nil {
			log.Print(err)
			return
		}
		results[tag] = string(resp)
	}
	for i, w := range words {
		if q.Len() == q.Depth() {
			if _, err := q.Wait(ctx, collect); err != nil {
				log.Fatal(err)
			}
		}
		if err := q.Start(ctx, upper, []byte(w), uint64(i)); err != nil {
			log.Fatal(err)
		}
	}
	for q.Len() > 0 {
		if _, err := q.Wait(ctx, collect); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(results)
	// Output: [ONE TWO THREE FOUR FIVE]
}

// A call with a bulk argument: the handler reads the client's memory one-sided.
func ExampleClient_CallBulk() {
	const count rpc.Method = 1
	srv := rpc.NewServer(nil)
	defer srv.Close()
	srv.HandleRaw(rpc.Spec{Number: count}, func(c *rpc.Call, req []byte) error {
		n := int(c.Bulk(0).Len)
		local, err := c.Conn().Poller().Pool().Get(n)
		if err != nil {
			return err
		}
		defer local.Release()
		if err := c.Pull(c.Context(), local.SGE(0, n), 0, 0); err != nil {
			return err
		}
		return c.ReplyBytes(fmt.Appendf(nil, "%d words", len(strings.Fields(string(local.Bytes())))))
	})
	addr := serve(srv)

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := rpc.Dial(ctx, addr, device, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	text := strings.Repeat("all work and no play ", 50_000)
	region, err := mr.Alloc(client.Conn().PD(), len(text), ib.AccessLocalWrite|ib.AccessRemoteRead|ib.AccessMWBind)
	if err != nil {
		log.Fatal(err)
	}
	defer region.Close()
	copy(region.Bytes(), text)
	err = client.CallBulk(ctx, count, nil, []rpc.Bulk{{MR: region, Len: len(text), Access: ib.AccessRemoteRead}}, func(resp []byte) error {
		fmt.Printf("%s\n", resp)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output: 250000 words
}
