package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func init() {
	testutil.RegisterChild("interop", func(args []string) { os.Exit(run(context.Background(), args, os.Stdout, os.Stderr)) })
}

func TestMain(m *testing.M) { testutil.Main(m) }

// patient bounds a run: an exchange takes milliseconds where the machine is emulated and others run on it, too.
func patient(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*testutil.Patience)
	t.Cleanup(cancel)
	return ctx
}

func TestArgumentsThatMakeNoSense(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", ""},
		{"rc -d soft0 -g 0 -s 0", "messages of 0 bytes"},
		{"rc -d soft0 -g 0 -m 1000", "an MTU of 1000 bytes"},
		{"rc -d soft0", "-g"},
		{"rc -d soft0 -g 0 -p 70000", "TCP port 70000"},
		{"rc -d soft0 -g 0 -i 0", "count from 1"},
		{"rc -d soft0 -g 0 -q 3", "shorthand"},
		{"ud -d soft0 -g 0 -s 1000000", "a datagram has at most"},
		{"ud -d soft0 -g 0 -m 1024", "shorthand"},
		{"uc -d nothing -g 0", "no such device"},
		{"srq -d soft0 -g 0 -q 256", "256 queue pairs"},
		{"srq -d soft0 -g 0 -q 10 -r 9", "9 receives are too few"},
		{"rc one two", "at most 1 arg"},
		{"integrity -d soft0", "-g"},
	} {
		t.Run(c.args, func(t *testing.T) {
			var out, errs strings.Builder
			code := run(t.Context(), strings.Fields(c.args), &out, &errs)
			if want := min(len(c.want), 1); code != want || !strings.Contains(errs.String(), c.want) {
				t.Errorf("exit status %d, %q; want %d with %q", code, errs.String(), want, c.want)
			}
		})
	}
}
