// Filecp copies a file from one process to another by one-sided reads, and checks its SHA-256. See README.md.
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
	"path/filepath"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/examples/internal/spawn"
	"github.com/ringside-rdma/ringside/rpc"
)

const usage = `usage: filecp [flags] FILE COPY             copy, with a server for FILE's folder in a process of its own
       filecp -serve FOLDER [flags]         be a server, of the files in a folder
       filecp -from ADDRESS [flags] FILE COPY   copy from a server

`

const defaultAddr = "127.0.0.1:7472"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	case ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "filecp: interrupted")
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "filecp:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	opts := &device.Options{}
	fs := flag.NewFlagSet("filecp", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Usage = func() { fmt.Fprint(stderr, usage); fs.PrintDefaults() }
	folder := fs.String("serve", "", "be a server of the files in this `folder`")
	addr := fs.String("addr", defaultAddr, "with -serve: listen at this `address`")
	from := fs.String("from", "", "copy from the server at this `address`")
	child := fs.Bool("child", false, "end when standard input does; filecp starts its server with this")
	opts.Flags(fs)
	if err := fs.Parse(args); err != nil {
		return err
	}
	switch {
	case *folder != "" && *from != "":
		return errors.New("-serve and -from are for different processes; see -help")
	case *folder != "" && fs.NArg() != 0:
		return fmt.Errorf("-serve takes no files, but %q was given; see -help", fs.Args())
	case *folder == "" && fs.NArg() != 2:
		return fmt.Errorf("give the file and the name of its copy, not %q; see -help", fs.Args())
	}
	if *child {
		var cancel context.CancelFunc
		ctx, cancel = spawn.WithParent(ctx)
		defer cancel()
	}
	switch {
	case *folder != "":
		return serve(ctx, *addr, opts, *folder, func(a net.Addr) { fmt.Fprintf(stdout, "listening on %s\n", a) })
	case *from != "":
		return get(ctx, *from, opts, fs.Arg(0), fs.Arg(1), stdout)
	}
	return both(ctx, opts, fs.Arg(0), fs.Arg(1), stdout, stderr)
}

// get copies a file of the server at addr.
func get(ctx context.Context, addr string, opts *device.Options, path, local string, stdout io.Writer) (err error) {
	dev, err := opts.Open()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	client, err := rpc.Dial(ctx, addr, dev.Config("filecp client"), nil)
	if err != nil {
		return err
	}
	defer client.Close()
	f, err := open(ctx, client, filepath.ToSlash(path))
	if err != nil {
		return fmt.Errorf("server %s: %w", addr, err)
	}
	defer f.close()
	start := time.Now()
	sum, err := receive(ctx, f, local)
	if err != nil {
		return err
	}
	took := time.Since(start)
	p := f.conn.Path()
	_, err = fmt.Fprintf(stdout, "%x  %s\n%d bytes in %.1f ms, %.0f MB/s, by one-sided reads; device %s, path %s\n", sum, local,
		f.size(), took.Seconds()*1e3, float64(f.size())/1e6/took.Seconds(), p.Device, p.Rung)
	return err
}

// both starts a server for the file's folder and copies from it.
func both(ctx context.Context, opts *device.Options, path, local string, stdout, stderr io.Writer) (err error) {
	server, err := spawn.Start(ctx, stderr, append(opts.Args(), "-serve", filepath.Dir(path), "-addr", "127.0.0.1:0", "-child")...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Stop()) }()
	addr, err := server.Expect("listening on ")
	if err != nil {
		return err
	}
	return get(ctx, addr, opts, filepath.Base(path), local, stdout)
}
