package uverbs

import (
	"encoding/binary"
	"errors"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/internal/uverbs/uverbstest"
)

// The kernel hears of a queue's handle while it is the queue's only: who destroys it waits for who names it.
func TestSRQHandle(t *testing.T) {
	const createSRQ, modifySRQ, querySRQ, destroySRQ = 32, 33, 34, 35
	k := &uverbstest.Kernel{}
	k.Init(t, 1)
	k.Own = func(c *uverbstest.Command) syscall.Errno {
		if c.Number != createSRQ {
			return uverbstest.AsUsual
		}
		binary.NativeEndian.PutUint32(c.Out, k.Handle("srq"))
		return 0
	}
	defer unix.Close(k.Async[0])
	p := &PD{C: &Context{File: NewFile(k, "fake0", 1)}}
	for cmd, names := range map[uint32]func(*SRQ){modifySRQ: func(s *SRQ) { s.Arm(1, nil) }, querySRQ: func(s *SRQ) { s.Limit() }} {
		s := &SRQ{}
		if _, _, err := s.Init(p, 7, 1, 0, nil, nil); err != nil {
			t.Fatal(err)
		}
		before, ended := k.Count(destroySRQ), make(chan error, 1)
		k.During[cmd] = func() {
			go func() { ended <- s.Destroy() }()
			testutil.Eventually(t, "Destroy waits", func() bool {
				free := s.mu.TryRLock()
				if free {
					s.mu.RUnlock()
				}
				return !free || k.Count(destroySRQ) > before
			})
			if k.Count(destroySRQ) > before {
				t.Errorf("destroyed during command %d", cmd)
			}
		}
		names(s)
		k.Mu.Lock()
		delete(k.During, cmd)
		k.Mu.Unlock()
		if err := errors.Join(<-ended, s.Destroy()); err != nil || k.Count(destroySRQ) != before+1 {
			t.Error(err)
		}
		commands := len(k.Commands)
		if n, err := s.Limit(), s.Arm(1, nil); n != 0 || err != driver.ErrClosed || len(k.Commands) != commands {
			t.Errorf("limit %d, %v, commands %d", n, err, k.Commands)
		}
	}
}
