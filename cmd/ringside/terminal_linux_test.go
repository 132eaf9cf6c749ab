package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// terminal returns both ends of a pseudo terminal: that of who looks at it, and that of the program.
func terminal(t *testing.T) (screen, program *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testutil.Skip(t, err.Error())
	}
	t.Cleanup(func() { screen.Close() })
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testutil.Skip(t, err.Error()) // no devpts
	}
	t.Cleanup(func() { program.Close() })
	return screen, program
}

// TestProgressOnTerminal: who looks at standard error sees what is being done, and nothing of it is left in the end.
func TestProgressOnTerminal(t *testing.T) {
	for _, c := range []struct{ args, term, want string }{
		{"perf read lat --device soft0 --spawn --duration 2500ms", "xterm", "\r\x1b[Kread lat 1/1, "},
		{"doctor --selftest --device soft0 --run ^rc/send-imm$", "xterm", "0 failed: in-process, rc/send-imm"},
		{"doctor --selftest --device soft0 --run ^rc/send-imm$", "dumb", ""},
	} {
		t.Run(c.args+" on "+c.term, func(t *testing.T) {
			screen, program := terminal(t)
			cmd := command(t, strings.Fields(c.args)...)
			cmd.Env = append(os.Environ(), "TERM="+c.term)
			cmd.Stderr = program
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			program.Close()
			shown, _ := io.ReadAll(screen) // ends with EIO when the program has ended
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			s := string(shown)
			if c.want == "" && s != "" || !strings.Contains(s, c.want) || c.want != "" && !strings.HasSuffix(s, "\r\x1b[K") {
				t.Errorf("shows %q, want %q", s, c.want)
			}
		})
	}
}
