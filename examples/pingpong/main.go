// Pingpong sends a message to another process and back, again and again, and prints how long that takes.
//
//	go run ./examples/pingpong                            both ends: it starts the other one as a child process
//	go run ./examples/pingpong -listen :7470              one end
//	go run ./examples/pingpong -connect host:7470         the other
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/ringside-rdma/ringside/examples/internal/spawn"
	"github.com/ringside-rdma/ringside/transport"
)

type options struct {
	listen, connect, device string
	mode                    transport.PollMode
	size, rounds            int
	child                   bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "pingpong:", err)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	fs := flag.NewFlagSet("pingpong", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.listen, "listen", "", "be the echoing end, at this `address`")
	fs.StringVar(&o.connect, "connect", "", "be the measuring end, and connect to this `address`")
	fs.StringVar(&o.device, "device", "", "device to use; empty: the best one, or what RINGSIDE_DEVICE says")
	fs.Func("poll", "how to wait: adaptive, busy or event (default adaptive)", func(s string) (err error) {
		o.mode, err = transport.ParsePollMode(s)
		return err
	})
	fs.IntVar(&o.size, "size", 64, "message size in `bytes`")
	fs.IntVar(&o.rounds, "n", 100_000, "round trips to measure")
	fs.BoolVar(&o.child, "child", false, "with -listen: serve one client, and end when standard input does")
	if err := fs.Parse(args); err != nil {
		return err
	}
	switch {
	case fs.NArg() > 0:
		return fmt.Errorf("unexpected argument %q; see -help", fs.Arg(0))
	case o.listen != "" && o.connect != "":
		return errors.New("-listen and -connect are for different processes; give neither to have both ends started")
	case o.rounds < 1:
		return fmt.Errorf("-n %d: at least one round trip is needed", o.rounds)
	case o.size < 0:
		return fmt.Errorf("-size %d: a message cannot be shorter than nothing", o.size)
	}
	cfg := &transport.Config{Device: o.device, PollMode: o.mode, Name: "pingpong", MaxMessage: max(o.size, 1<<20)}
	switch {
	case o.listen != "":
		return listen(ctx, &o, cfg, stdout, stderr)
	case o.connect != "":
		return connect(ctx, &o, cfg, o.connect, stdout)
	}
	return both(ctx, &o, cfg, stdout, stderr)
}

func listen(ctx context.Context, o *options, cfg *transport.Config, stdout, stderr io.Writer) error {
	clients := 0
	if o.child {
		clients = 1
		var cancel context.CancelFunc
		ctx, cancel = spawn.WithParent(ctx)
		defer cancel()
	}
	l, err := transport.Listen(ctx, o.listen, cfg)
	if err != nil {
		return err
	}
	defer l.Close()
	fmt.Fprintf(stdout, "listening on %s\n", l.Addr())
	if err := serve(ctx, l, clients, stderr); err != nil && ctx.Err() == nil {
		return err
	}
	return nil // interrupted, or done
}

func connect(ctx context.Context, o *options, cfg *transport.Config, addr string, stdout io.Writer) error {
	c, err := transport.Dial(ctx, addr, cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	r, err := ping(ctx, c, o.size, o.rounds)
	if err != nil {
		return err
	}
	r.print(stdout)
	return c.Close()
}

// both runs the echoing end in a child process and measures.
func both(ctx context.Context, o *options, cfg *transport.Config, stdout, stderr io.Writer) (err error) {
	child, err := spawn.Start(ctx, stderr, "-listen", "127.0.0.1:0", "-child", "-device", o.device,
		"-poll", o.mode.String(), "-size", fmt.Sprint(o.size))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, child.Stop()) }()
	addr, err := child.Expect("listening on ")
	if err != nil {
		return err
	}
	return connect(ctx, o, cfg, addr, stdout)
}
