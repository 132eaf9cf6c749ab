// Paramserver trains a classifier of handwritten digits on one server and any number of worker processes, which pull the
// parameters and push their gradients by one-sided operations. See README.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/examples/internal/spawn"
)

const (
	defaultWorkers  = 3
	defaultEpochs   = 12
	defaultBatch    = 48
	defaultRate     = 0.25
	defaultMomentum = 0.5
)

type options struct {
	demo            bool
	listen, connect string
	device          device.Options
	train           trainConfig
	mode            string
	kill            int
	pause           time.Duration
	child           bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "paramserver: interrupted")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "paramserver:", err)
		os.Exit(1)
	}
}

func parse(args []string, stderr io.Writer) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("paramserver", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() {
		fmt.Fprint(stderr, `usage: paramserver -demo [flags]             a server and its workers, each in a process of its own
       paramserver -listen ADDRESS [flags]   a server
       paramserver -connect ADDRESS [flags]  a worker; start as many as you like, and more while it runs

`)
		fs.PrintDefaults()
	}
	fs.BoolVar(&o.demo, "demo", false, "start a server and workers, and show how they train")
	fs.StringVar(&o.listen, "listen", "", "be a server at this `address`")
	fs.StringVar(&o.connect, "connect", "", "be a worker of the server at this `address`")
	o.device.Flags(fs)
	fs.IntVar(&o.train.workers, "workers", defaultWorkers, "server, demo: workers that training starts with")
	fs.StringVar(&o.mode, "mode", "sync", "server, demo: sync (steps with a barrier) or stale (bounded staleness)")
	fs.IntVar(&o.train.staleness, "staleness", 3, "server, demo: with -mode stale, `gradients` that a worker may be ahead of the slowest")
	fs.IntVar(&o.train.epochs, "epochs", defaultEpochs, "server, demo: times to go through the training digits")
	fs.IntVar(&o.train.batch, "batch", defaultBatch, "server, demo: `digits` that the workers have in hand together")
	fs.Float64Var(&o.train.rate, "rate", defaultRate, "server, demo: learning rate")
	fs.Float64Var(&o.train.momentum, "momentum", defaultMomentum, "server, demo: momentum")
	fs.Uint64Var(&o.train.seed, "seed", 1, "server, demo: of the first parameters and the order of the digits")
	fs.IntVar(&o.kill, "kill", 0, "demo: kill a worker (kill -9) after this `epoch`, and start another in its place")
	fs.DurationVar(&o.pause, "pause", 0, "worker: wait so long before each gradient; demo: all workers do, the first one twice as long")
	fs.BoolVar(&o.child, "child", false, "end when standard input does; the demo starts its processes with this")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	roles := 0
	for _, chosen := range []bool{o.demo, o.listen != "", o.connect != ""} {
		if chosen {
			roles++
		}
	}
	switch {
	case fs.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q; see -help", fs.Arg(0))
	case roles != 1:
		return nil, errors.New("give one of -demo, -listen and -connect; see -help")
	case o.mode != "sync" && o.mode != "stale":
		return nil, fmt.Errorf("-mode %q: want sync or stale", o.mode)
	case o.kill < 0 || o.kill >= o.train.epochs && o.kill > 0:
		return nil, fmt.Errorf("-kill %d: not an epoch before the last, %d", o.kill, o.train.epochs)
	case o.pause < 0:
		return nil, fmt.Errorf("-pause %v is negative", o.pause)
	}
	if o.train.sync = o.mode == "sync"; o.train.sync {
		o.train.staleness = 0
	}
	return o, o.train.check()
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	o, err := parse(args, stderr)
	if err != nil {
		return err
	}
	if o.child {
		var cancel context.CancelFunc
		ctx, cancel = spawn.WithParent(ctx)
		defer cancel()
	}
	switch {
	case o.listen != "":
		err = serve(ctx, o.listen, &o.device, o.train, stdout, func(a net.Addr) {
			fmt.Fprintf(stdout, "%s%s\n", listeningPrefix, a)
		})
	case o.connect != "":
		err = work(ctx, o.connect, &o.device, o.pause)
	default:
		return demo(ctx, o, stdout, stderr)
	}
	if o.child && ctx.Err() != nil {
		return nil // the demo has asked us to end, and says why
	}
	return err
}
