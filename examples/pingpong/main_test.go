package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/transport"
	"github.com/ringside-rdma/ringside/transport/transporttest"
)

// With mainEnv set the test binary is the program: it starts itself as a child, as the program does.
const mainEnv = "PINGPONG_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main()
		return
	}
	testutil.Main(m)
}

func TestBothEnds(t *testing.T) {
	t.Setenv(mainEnv, "1")
	for _, args := range [][]string{
		{"-n", "200"},
		{"-n", "50", "-size", "0"},
		{"-n", "20", "-size", "300000"},
		{"-n", "50", "-poll", "event"},
		{"-n", "50", "-poll", "busy"},
	} {
		var out, errs strings.Builder
		ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
		err := run(ctx, args, &out, &errs)
		cancel()
		if err != nil || !strings.Contains(out.String(), "round trip: p50 ") || errs.Len() > 0 {
			t.Errorf("%v: %v\n%s%s", args, err, out.String(), errs.String())
		}
		t.Logf("%v\n%s", args, out.String())
	}
}

func TestInOneProcess(t *testing.T) {
	testutil.CheckLeaks(t)
	a, b := transporttest.Pair(t, nil)
	done := make(chan error, 1)
	go func() { done <- echo(t.Context(), b) }()
	r, err := ping(t.Context(), a, 64, 100)
	if err != nil {
		t.Fatal(err)
	}
	if n := r.rtt.TotalCount(); n != 100 {
		t.Errorf("%d round trips recorded", n)
	}
	if err := a.CloseWrite(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Errorf("echo: %v", err)
	}
}

// An only client's failure is the server's. One that serves for ever tells of it, and goes on with the next; clients that
// hang up are no news.
func TestClientFails(t *testing.T) {
	testutil.CheckLeaks(t)
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	for _, clients := range []int{1, 0} {
		l, err := transport.Listen(ctx, "127.0.0.1:0", nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(ctx)
		var errs strings.Builder
		done := make(chan error, 1)
		go func() { done <- serve(ctx, l, clients, &errs) }()
		client := func(addr string) *transport.Conn {
			c, err := transport.Dial(ctx, addr, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := ping(ctx, c, 64, 1); err != nil {
				t.Error(err)
			}
			return c
		}
		addr, cut := proxy(t, l.Addr().String())
		dies := client(addr)
		cut()
		<-dies.Done()
		testutil.Close(t, dies)
		if clients == 1 {
			if err := <-done; !errors.Is(err, transport.ErrPeerDied) {
				t.Errorf("an only client died: %v", err)
			}
		} else {
			testutil.Close(t, client(l.Addr().String()))
			testutil.Close(t, client(l.Addr().String())) // is served when the server is through with the one before
			stop()
			<-done
			if got := errs.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, transport.ErrPeerDied.Error()) {
				t.Errorf("told of the clients: %q", got)
			}
		}
		stop()
		testutil.Close(t, l)
	}
}

// proxy hands one TCP connection on to addr, until cut ends both halves: to either end the other one has died.
func proxy(t *testing.T, addr string) (via string, cut func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ends := make(chan net.Conn, 2)
	go func() {
		defer l.Close()
		defer close(ends)
		near, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		ends <- near
		far, err := net.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			return
		}
		ends <- far
		go io.Copy(near, far)
		go io.Copy(far, near)
	}()
	return l.Addr().String(), func() {
		for c := range ends {
			c.Close()
		}
	}
}

func TestBadUse(t *testing.T) {
	for _, c := range []struct {
		args string
		want string
	}{
		{"-listen :0 -connect x:1", "different processes"},
		{"-n 0", "at least one"},
		{"-size -1", "shorter"},
		{"-poll often", "poll"},
		{"extra", "unexpected argument"},
		{"-connect 127.0.0.1:1", "127.0.0.1:1"},
		{"-listen 127.0.0.1:0 -device nosuch0", "nosuch0"},
	} {
		var out strings.Builder
		err := run(t.Context(), strings.Fields(c.args), &out, &out)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.args, err)
		}
	}
}
