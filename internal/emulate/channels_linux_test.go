package emulate

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestChannel(t *testing.T) {
	for _, name := range []string{"channel", "manychannels", "waitforevent", "afterexec"} {
		t.Run(name, func(t *testing.T) {
			end(t, start(t, Config{Log: t.Output()}, name), 0)
		})
	}
}

// A call that waits, of which there is no end in sight, ends with the program.
func TestChannelWait(t *testing.T) {
	for _, how := range []string{"close", "end"} {
		t.Run(how, func(t *testing.T) {
			end(t, start(t, Config{Log: t.Output()}, "waitfornothing", how), 0)
		})
	}
}

func TestChannelKilled(t *testing.T) {
	s := start(t, Config{Log: t.Output()}, "waitforevent")
	testutil.Eventually(t, "there is a channel", func() bool { return channels(s) == 1 })
	s.Signal(unix.SIGKILL)
	if st, err := s.Wait(); err != nil || !st.Signaled() {
		t.Errorf("ended with %#x, %v", st, err)
	}
	if n := channels(s); n != 0 {
		t.Errorf("%d channels are left", n)
	}
}

// It is said once why there is no file.
func TestNoNumberForChannel(t *testing.T) {
	for name, want := range map[string]string{"manychannels": "files with all the numbers", "fewnumbers": "ulimit -n"} {
		var log lockedBuffer
		end(t, start(t, Config{Log: &log}, name), 0)
		if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), want) {
			t.Errorf("%s: it is said that\n%s", name, log.String())
		}
	}
}

func channels(s *Session) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.channels)
}

func TestNumbers(t *testing.T) {
	n, err := chooseNumbers()
	if err != nil || n.first < 1 || n.last < n.first || n.last >= fdSetSize {
		t.Errorf("numbers %+v, %v", n, err)
	}
}
