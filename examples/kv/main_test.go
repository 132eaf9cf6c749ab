package main

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/examples/internal/spawn"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/rpc"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// With mainEnv set the test binary is the program: it starts itself as a child, as the program does.
const mainEnv = "KV_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main()
		return
	}
	testutil.Main(m)
}

func patience(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

// startServer runs a server in this process and returns its address and what stops it.
func startServer(t *testing.T, entries int) (addr string, stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(patience(t))
	ready := make(chan net.Addr, 1)
	done := make(chan error, 1)
	go func() {
		done <- serve(ctx, "127.0.0.1:0", &device.Options{}, entries, func(a net.Addr) { ready <- a })
	}()
	stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	}
	select {
	case a := <-ready:
		return a.String(), stop
	case err := <-done:
		t.Fatal(err)
	}
	panic("unreachable")
}

func TestGetPutDelete(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx := patience(t)
	addr, stop := startServer(t, 1)
	c, err := dial(ctx, addr, &device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	key := []byte("key")
	if v, err := c.get(ctx, key); err != nil || v != nil {
		t.Errorf("before the put: %q, %v", v, err)
	}
	for _, value := range []string{"value", "", strings.Repeat("x", maxValue)} {
		if err := c.put(ctx, key, []byte(value)); err != nil {
			t.Fatal(err)
		}
		if v, err := c.get(ctx, key); err != nil || v == nil || string(v) != value {
			t.Errorf("got %q, %v; want %q", v, err, value)
		}
	}
	for _, want := range []bool{true, false} {
		if found, err := c.del(ctx, key); err != nil || found != want {
			t.Errorf("del: %v, %v", found, err)
		}
	}
	if err := c.put(ctx, nil, nil); rpc.CodeOf(err) != rpc.InvalidArgument || !strings.Contains(err.Error(), "a key has") {
		t.Errorf("an empty key: %v", err)
	}
	for i := range window {
		if err := c.put(ctx, []byte{'a' + byte(i)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.put(ctx, key, nil); rpc.CodeOf(err) != rpc.ResourceExhausted {
		t.Errorf("a full window: %v", err)
	}

	// One grant a connection: each takes a memory window of the server's device.
	if _, err := rpc.Invoke[*OpenReply](ctx, c.rpc, methodOpen, &OpenRequest{}); rpc.CodeOf(err) != rpc.FailedPrecondition {
		t.Errorf("a second open: %v", err)
	}
	if err := c.close(); err != nil {
		t.Error(err)
	}
	stop()
}

// The grant is for reading, and for the table only: the server's device sees to it, whatever a client believes.
func TestGrant(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx := patience(t)
	addr, stop := startServer(t, 1)
	defer stop()
	for what, forged := range map[string]func(c *client, r transport.Remote) error{
		"a write": func(c *client, r transport.Remote) error {
			r.Access |= ib.AccessRemoteWrite
			return c.conn.Write(ctx, c.local.SGE(0, 8), r, 0)
		},
		"a read across the table's end": func(c *client, r transport.Remote) error {
			r.Len += 8
			return c.conn.Read(ctx, c.local.SGE(0, 16), r, r.Len-16)
		},
		"a read before its start": func(c *client, r transport.Remote) error {
			r.Addr -= 8
			return c.conn.Read(ctx, c.local.SGE(0, 8), r, 0)
		},
	} {
		c, err := dial(ctx, addr, &device.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := forged(c, c.region); err == nil {
			t.Errorf("%s went well", what)
		}
		select {
		case <-c.conn.Done(): // so the server's device has refused it
		case <-ctx.Done():
			t.Errorf("%s did not end the connection", what)
		}
		if err := c.close(); err != nil {
			t.Error(err)
		}
	}
}

// A race needs somebody who writes.
func TestNoRace(t *testing.T) {
	ctx := patience(t)
	addr, stop := startServer(t, 1)
	defer stop()
	c, err := dial(ctx, addr, &device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	key := []byte("cold")
	if err := c.put(ctx, key, patterned(1)); err != nil {
		t.Fatal(err)
	}
	if r, err := race(ctx, c, key, time.Millisecond); err == nil || !strings.Contains(err.Error(), "no race") {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestCommands(t *testing.T) {
	ctx := patience(t)
	addr, stop := startServer(t, 64)
	defer stop()
	for _, c := range []struct {
		args string
		want string // in the output, or in the error
		fail bool
	}{
		{"put -addr ADDR colour blue", "", false},
		{"get -addr ADDR colour", "blue\n", false},
		{"del -addr ADDR colour", "", false},
		{"del -addr ADDR colour", "no such key", true},
		{"get -addr ADDR colour", "no such key", true},
		{"get -addr ADDR", "takes 1 arguments, not 0", true},
		{"steal", "unknown command", true},
		{"serve -entries 0", "-entries 0", true},
		{"demo -for 0", "-for 0s", true},
		{"demo -for -1s", "-for -1s", true},
		{"get -addr 127.0.0.1:1 colour", "127.0.0.1:1", true},
	} {
		var out strings.Builder
		err := run(ctx, strings.Fields(strings.Replace(c.args, "ADDR", addr, 1)), &out, &out)
		if c.fail {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", c.args, err)
			}
		} else if err != nil || out.String() != c.want {
			t.Errorf("%s: %q, %v", c.args, out.String(), err)
		}
	}
}

// Server, writer and reader are three processes, and race.
func TestTornReadsBetweenProcesses(t *testing.T) {
	t.Setenv(mainEnv, "1")
	ctx := patience(t)
	var out, errs strings.Builder
	length := 700 * time.Millisecond
	err := run(ctx, []string{"demo", "-for", length.String()}, &out, &errs)
	for err != nil && strings.Contains(err.Error(), "no race") && length < 10*time.Second { // the writer had no processor
		length *= 4
		err = run(ctx, []string{"demo", "-for", length.String()}, &out, &errs)
	}
	if err != nil {
		t.Fatal(err, errs.String())
	}
	if !strings.Contains(out.String(), "all whole") || errs.Len() > 0 {
		t.Errorf("%s%s", out.String(), errs.String())
	}
	t.Log(out.String())
}

// A writer that is killed in the middle of a call, or a client in the middle of a read, disturbs nobody.
func TestKilledWriter(t *testing.T) {
	t.Setenv(mainEnv, "1")
	ctx := patience(t)
	addr, stop := startServer(t, 16)
	defer stop()
	c, err := dial(ctx, addr, &device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for range 3 {
		writer, err := spawn.Start(ctx, os.Stderr, "write", "-child", "-addr", addr, "hot")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := writer.Expect("writing"); err != nil {
			t.Fatal(err)
		}
		if _, err := c.get(ctx, []byte("hot")); err != nil {
			t.Fatal(err)
		}
		writer.Kill()
		v, err := c.get(ctx, []byte("hot"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := checkPatterned(v); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.put(ctx, []byte("hot"), []byte("cold")); err != nil {
		t.Fatal(err)
	}
}

// A killed server is noticed by a client that only reads memory.
func TestKilledServer(t *testing.T) {
	t.Setenv(mainEnv, "1")
	ctx := patience(t)
	server, err := spawn.Start(ctx, os.Stderr, "serve", "-child", "-addr", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr, err := server.Expect("listening on ")
	if err != nil {
		t.Fatal(err)
	}
	c, err := dial(ctx, addr, &device.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	server.Kill()
	for err == nil {
		_, err = c.get(ctx, []byte("key"))
		time.Sleep(time.Millisecond)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not noticed: %v", err)
	}
	t.Log(err)
}
