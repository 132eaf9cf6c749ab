package spawn

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

const childEnv = "SPAWN_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		testutil.Main(m)
	}
	switch os.Args[1] {
	case "until-told":
		ctx, cancel := WithParent(context.Background())
		defer cancel()
		fmt.Println("ready now")
		<-ctx.Done()
	case "hang":
		fmt.Println("ready now")
		time.Sleep(time.Hour)
	case "fail":
		os.Exit(7)
	}
}

func start(t *testing.T, ctx context.Context, what string) *Process {
	t.Helper()
	t.Setenv(childEnv, "1")
	p, err := Start(ctx, os.Stderr, what)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Kill)
	return p
}

func TestStop(t *testing.T) {
	p := start(t, t.Context(), "until-told")
	if rest, err := p.Expect("ready "); err != nil || rest != "now" {
		t.Fatal(rest, err)
	}
	if p.Err() != nil {
		t.Error("it ended too early")
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
}

func TestContextStops(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	p := start(t, ctx, "until-told")
	if _, err := p.Expect("ready"); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case <-p.Done():
	case <-time.After(testutil.Patience):
		t.Fatal("still there")
	}
}

func TestKill(t *testing.T) {
	p := start(t, t.Context(), "hang")
	if _, err := p.Expect("ready"); err != nil {
		t.Fatal(err)
	}
	p.Kill()
	if p.Err() == nil {
		t.Error("a killed process ended well")
	}
	if _, err := p.Line(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}

func TestFailure(t *testing.T) {
	p := start(t, t.Context(), "fail")
	if _, err := p.Expect("ready"); err == nil {
		t.Error("a line came from nowhere")
	}
	var exit *exec.ExitError
	if err := p.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("ended with %v", err)
	}
}
