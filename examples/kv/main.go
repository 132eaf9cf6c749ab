// Kv is a server's hash table that clients read with one-sided operations, without the server's help, and write by RPC.
// Reads of an entry that is being overwritten are noticed and repeated. See README.md.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/examples/internal/spawn"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "kv: interrupted")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "kv:", err)
		os.Exit(1)
	}
}

const usage = `usage: kv demo [flags]               a server, a writer and a reader that race, each in a process of its own
       kv serve [flags]              a server
       kv get [flags] KEY            print a value
       kv put [flags] KEY VALUE
       kv del [flags] KEY
       kv write [flags] KEY          overwrite a key again and again, as the demo's writer does

`

const defaultAddr = "127.0.0.1:7471"

var errNotFound = errors.New("no such key")

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	command := "demo"
	if len(args) > 0 && len(args[0]) > 0 && args[0][0] != '-' {
		command, args = args[0], args[1:]
	}
	opts := &device.Options{}
	var addr string
	var entries int
	var length time.Duration
	var child bool
	fs := flag.NewFlagSet("kv "+command, flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprint(stderr, usage); fs.PrintDefaults() }
	fs.StringVar(&addr, "addr", defaultAddr, "`address` of the server")
	opts.Flags(fs)
	fs.IntVar(&entries, "entries", 4096, "serve: `size` of the table")
	fs.DurationVar(&length, "for", 2*time.Second, "demo: how long to race")
	fs.BoolVar(&child, "child", false, "end when standard input does; the demo starts its processes with this")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if child {
		var cancel context.CancelFunc
		ctx, cancel = spawn.WithParent(ctx)
		defer cancel()
	}
	want, ok := map[string]int{"demo": 0, "serve": 0, "get": 1, "put": 2, "del": 1, "write": 1}[command]
	switch {
	case !ok:
		return fmt.Errorf("unknown command %q; see kv -help", command)
	case fs.NArg() != want:
		return fmt.Errorf("%s takes %d arguments, not %d; see kv -help", command, want, fs.NArg())
	case entries < 1 || entries > maxEntries:
		return fmt.Errorf("-entries %d: not between 1 and %d", entries, maxEntries)
	case length <= 0:
		return fmt.Errorf("-for %v: a race takes some time", length)
	}
	switch command {
	case "serve":
		return serve(ctx, addr, opts, entries, func(a net.Addr) { fmt.Fprintf(stdout, "listening on %s\n", a) })
	case "demo":
		return demo(ctx, opts, length, stdout, stderr)
	}
	c, err := dial(ctx, addr, opts)
	if err != nil {
		return err
	}
	defer c.close()
	key := []byte(fs.Arg(0))
	switch command {
	case "get":
		v, err := c.get(ctx, key)
		if err != nil {
			return err
		}
		if v == nil {
			return fmt.Errorf("%w: %q", errNotFound, key)
		}
		_, err = fmt.Fprintf(stdout, "%s\n", v)
		return err
	case "put":
		return c.put(ctx, key, []byte(fs.Arg(1)))
	case "del":
		found, err := c.del(ctx, key)
		if err == nil && !found {
			err = fmt.Errorf("%w: %q", errNotFound, key)
		}
		return err
	}
	return write(ctx, c, key, stdout)
}

// patterned is a value that shows whether it is of one piece: one number, over and over.
func patterned(n uint64) []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, n), 1+int(n%(maxValue/8)))
}

// checkPatterned returns the number of a patterned value, or an error if it is made of two.
func checkPatterned(v []byte) (uint64, error) {
	if len(v) >= 8 {
		if n := binary.LittleEndian.Uint64(v); bytes.Equal(v, patterned(n)) {
			return n, nil
		}
	}
	return 0, fmt.Errorf("a torn value was returned: % x", v)
}

// write overwrites a key until ctx ends, and prints how often it has.
func write(ctx context.Context, c *client, key []byte, stdout io.Writer) error {
	var n uint64
	for ; ctx.Err() == nil; n++ {
		if err := c.put(ctx, key, patterned(n)); err != nil {
			if ctx.Err() != nil {
				break
			}
			return err
		}
		if n == 0 {
			fmt.Fprintln(stdout, "writing")
		}
	}
	fmt.Fprintf(stdout, "%d\n", n)
	return nil
}

// demo races a reader in this process with a writer in another, on one key of a server in a third.
func demo(ctx context.Context, opts *device.Options, length time.Duration, stdout, stderr io.Writer) (err error) {
	server, err := spawn.Start(ctx, stderr, append([]string{"serve", "-child", "-addr", "127.0.0.1:0"}, opts.Args()...)...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	addr, err := server.Expect("listening on ")
	if err != nil {
		return err
	}
	writer, err := spawn.Start(ctx, stderr, append(append([]string{"write", "-child", "-addr", addr}, opts.Args()...), "hot")...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, writer.Stop()) }()
	if _, err := writer.Expect("writing"); err != nil {
		return err
	}
	c, err := dial(ctx, addr, opts)
	if err != nil {
		return err
	}
	defer c.close()
	r, err := race(ctx, c, []byte("hot"), length)
	if err != nil {
		return err
	}
	path := c.conn.Path()
	us := func(ns int64) float64 { return float64(ns) / 1000 }
	fmt.Fprintf(stdout, "device %s, path %s\n", path.Device, path.Rung)
	fmt.Fprintf(stdout, "%d gets of a key that another process overwrites: p50 %.2f us, p99 %.2f us, p99.9 %.2f us\n",
		r.lookups, us(r.latency.ValueAtQuantile(50)), us(r.latency.ValueAtQuantile(99)), us(r.latency.ValueAtQuantile(99.9)))
	fmt.Fprintf(stdout, "%d different values were seen, all whole; %d reads were torn, noticed and repeated\n", r.values, r.torn)
	return nil
}

// raceResult is what a race found.
type raceResult struct {
	lookupStats
	values  int // different ones
	latency *hdrhistogram.Histogram
}

// race reads a key of patterned values, and fails if it is ever given one that is not whole, or an older one after a newer,
// or if the value does not change meanwhile.
func race(ctx context.Context, c *client, key []byte, length time.Duration) (*raceResult, error) {
	r := &raceResult{latency: hdrhistogram.New(1, int64(10*time.Second), 3)}
	c.stats = lookupStats{}
	var last uint64
	for start := time.Now(); time.Since(start) < length; {
		t := time.Now()
		v, err := c.get(ctx, key)
		if err != nil {
			return nil, err
		}
		r.latency.RecordValue(min(int64(time.Since(t)), r.latency.HighestTrackableValue()))
		n, err := checkPatterned(v)
		if err != nil {
			return nil, err
		}
		if n < last {
			return nil, fmt.Errorf("value %d was read after value %d", n, last)
		}
		if n != last {
			r.values++
		}
		last = n
	}
	if r.values < 2 {
		return nil, fmt.Errorf("nobody wrote to %q in %v: that was no race", key, length)
	}
	r.lookupStats = c.stats
	return r, nil
}
