package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/examples/internal/device"
	"github.com/ringside-rdma/ringside/examples/internal/spawn"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/rpc"
)

// With mainEnv set the test binary is the program: it starts itself as a child, as the program does.
const mainEnv = "FILECP_TEST_MAIN"

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

func TestBetweenProcesses(t *testing.T) {
	t.Setenv(mainEnv, "1")
	for name, size := range map[string]int{"empty": 0, "small": 1000, "large": 7<<20 + 12345} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
			data := randomFile(t, from, size)
			var out, errs strings.Builder
			if err := run(patience(t), []string{from, to}, &out, &errs); err != nil {
				t.Fatal(err, errs.String())
			}
			if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, data) {
				t.Errorf("the copy differs (%v)", err)
			}
			if want := fmt.Sprintf("%x  %s\n%d bytes", sha256.Sum256(data), to, size); !strings.HasPrefix(out.String(), want) {
				t.Errorf("printed %q, want %q", out.String(), want)
			}
			t.Log(out.String())
		})
	}
}

func TestRefusals(t *testing.T) {
	t.Setenv(mainEnv, "1")
	dir := t.TempDir()
	randomFile(t, filepath.Join(dir, "file"), 10)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"DIR/missing", "DIR/copy"}, "no such file"},
		{[]string{"DIR/nowhere/file", "DIR/copy"}, "nowhere: no such file"},
		{[]string{"DIR/file", "DIR/nowhere/copy"}, "nowhere"},
		{[]string{"DIR/file", "DIR"}, "is a directory"},
		{[]string{"-from", "127.0.0.1:1", "file", "DIR/copy"}, "127.0.0.1:1"},
		{[]string{"-serve", "DIR/nowhere"}, "nowhere"},
		{[]string{"-serve", "DIR", "file"}, "-serve takes no files"},
		{[]string{"-serve", "DIR", "-from", "x"}, "different processes"},
		{[]string{"file"}, "name of its copy"},
	} {
		for i := range c.args {
			c.args[i] = strings.Replace(c.args[i], "DIR", dir, 1)
		}
		var out strings.Builder
		err := run(patience(t), c.args, &out, &out)
		if err == nil || !strings.Contains(err.Error()+out.String(), c.want) {
			t.Errorf("%v: %v %s", c.args, err, out.String())
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

// A server serves many clients at once, of which some die in the middle, and gives back what they held.
func TestServer(t *testing.T) {
	testutil.CheckLeaks(t)
	dir := t.TempDir()
	data := randomFile(t, filepath.Join(dir, "file"), 3*chunkBytes)
	ctx, cancel := context.WithCancel(patience(t))
	ready := make(chan net.Addr, 1)
	done := make(chan error, 1)
	go func() {
		done <- serve(ctx, "127.0.0.1:0", &device.Options{}, dir, func(a net.Addr) { ready <- a })
	}()
	var addr string
	select {
	case a := <-ready:
		addr = a.String()
	case err := <-done:
		t.Fatal(err)
	}

	t.Setenv(mainEnv, "1")
	if err := os.WriteFile(filepath.Join(dir, "endless"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "endless"), 64<<30); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		for _, when := range []string{"at once", "in the middle of the file"} {
			to := t.TempDir()
			p, err := spawn.Start(ctx, os.Stderr, "-from", addr, "-child", "endless", filepath.Join(to, "killed"))
			if err != nil {
				t.Fatal(err)
			}
			if when != "at once" {
				testutil.Eventually(t, "some of the file is there", func() bool {
					parts, err := filepath.Glob(filepath.Join(to, ".killed.part-*"))
					if err != nil || len(parts) == 0 {
						return false
					}
					info, err := os.Stat(parts[0])
					return err == nil && info.Size() > 0
				})
			}
			p.Kill()
			if _, err := os.Stat(filepath.Join(to, "killed")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("killed %s: there is a copy (%v)", when, err)
			}
		}
	}
	dev, err := (&device.Options{}).Open()
	if err != nil {
		t.Fatal(err)
	}
	client, err := rpc.Dial(ctx, addr, dev.Config("test"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(ctx, client, "missing"); rpc.CodeOf(err) != rpc.NotFound || !strings.Contains(err.Error(), "missing") {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := open(ctx, client, "../file"); rpc.CodeOf(err) != rpc.InvalidArgument {
		t.Errorf("a file outside: %v", err)
	}
	results := make(chan error, 4)
	for i := range cap(results) {
		go func() {
			var out strings.Builder
			copied := filepath.Join(dir, fmt.Sprint("copy", i))
			err := get(ctx, addr, &device.Options{}, "file", copied, &out)
			if got, rerr := os.ReadFile(copied); err == nil && (rerr != nil || !bytes.Equal(got, data)) {
				err = fmt.Errorf("copy %d differs (%v)", i, rerr)
			}
			results <- err
		}()
	}
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}

	// A session ends with its connection, and cannot be used by another one.
	f, err := open(ctx, client, "file")
	if err != nil {
		t.Fatal(err)
	}
	other, err := rpc.Dial(ctx, addr, dev.Config("test"), nil)
	if err != nil {
		t.Fatal(err)
	}
	stolen := *f
	stolen.client = other
	if _, err := stolen.load(ctx, 0); rpc.CodeOf(err) != rpc.FailedPrecondition {
		t.Errorf("another client's handle: %v", err)
	}
	if _, err := f.load(ctx, 0); err != nil {
		t.Error(err)
	}
	for _, c := range []interface{ Close() error }{f.local, other, client, dev} {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
