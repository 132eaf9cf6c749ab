package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
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
