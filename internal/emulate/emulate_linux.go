package emulate

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/cmemu"
	"github.com/ringside-rdma/ringside/internal/mlx5emu"
	"github.com/ringside-rdma/ringside/internal/seccomp"
)

// A Config says what the program finds.
type Config struct {
	// Devices is how many there are, mlx5_0 and so on; default 1.
	Devices int
	// Numbered gives QPs, keys and completions numbers that are the same in each run.
	Numbered bool
	// Manual has nobody look at doorbells: nothing is ever sent or completed. It is for measuring what a driver costs.
	Manual bool
	// L2Inline makes them devices that want the first 18 bytes of an Ethernet frame inline, as ConnectX-4 does.
	L2Inline bool
	// InfiniBand makes them devices of that link layer, on one subnet.
	InfiniBand bool
	// Trace, if it is not nil, gets a line for each doorbell, WQE and CQE, which begins with the device's name if there are several.
	// Writes do not overlap.
	Trace io.Writer
	// Loss is the probability, 0 to 1, that a packet which comes in over UDP is lost.
	Loss float64
	// Reap has Wait take away dead children that this process has not started, for a process that has no others of its own. As the
	// first of a container it gets what the program has left behind, and before Linux 6.11 what nobody has waited for counts as
	// somebody who can still make calls: Wait would not return.
	Reap bool
	// Log gets complaints about what the program does, a line each; nil: nobody does.
	Log io.Writer
}

const maxDevices = 32 // uverbs nodes of the fixed numbers

// A Session is a program with its devices.
type Session struct {
	cfg     Config
	devices []*mlx5emu.Device
	manager *cmemu.Manager // of connections
	tree    *tree
	process *seccomp.Process
	served  chan error     // how serve has ended
	living  sync.WaitGroup // contexts and channels
	wait    func() (syscall.WaitStatus, error)
	numbers numbers    // of files of channels
	placing sync.Mutex // held while a file gets one of the numbers
	once    sync.Once  // the complaint that there is no number for a file
	held    held

	mu       sync.Mutex
	contexts map[fileID]*openContext // guarded by mu, as what follows
	channels map[fileID]*openChannel

	logs sync.Mutex
}

var errWithdrawn = seccomp.ErrWithdrawn

// Start starts a program: path, with argv, whose first element is its name. It has this process' standard files and environment.
// Wait has to follow.
func Start(cfg Config, path string, argv []string) (*Session, error) {
	if cfg.Devices == 0 {
		cfg.Devices = 1
	}
	if cfg.Devices < 0 || cfg.Devices > maxDevices {
		return nil, fmt.Errorf("%d devices: there can be 1 to %d", cfg.Devices, maxDevices)
	}
	if !(cfg.Loss >= 0 && cfg.Loss < 1) {
		return nil, fmt.Errorf("a loss of %v: it is a probability, at least 0 and less than 1", cfg.Loss)
	}
	s := &Session{cfg: cfg, contexts: map[fileID]*openContext{}, channels: map[fileID]*openChannel{}, served: make(chan error, 1),
		held: held{calls: map[int]call{}}}
	if err := s.start(path, argv); err != nil {
		s.end()
		return nil, err
	}
	s.wait = sync.OnceValues(s.waitOnce)
	go s.serve()
	return s, nil
}

func (s *Session) start(path string, argv []string) (err error) {
	if err := s.makeDevices(); err != nil {
		return err
	}
	s.manager = cmemu.New(s.devices)
	if s.tree, err = newTree(s.devices); err != nil {
		return err
	}
	if s.numbers, err = chooseNumbers(); err != nil {
		return err
	}
	s.process, err = seccomp.Start(path, argv, rules(s.numbers))
	return err
}

func (s *Session) makeDevices() error {
	faults := ""
	if s.cfg.Loss > 0 {
		faults = fmt.Sprintf("loss=%g%%", 100*s.cfg.Loss)
	}
	var lines sync.Mutex
	for i := range s.cfg.Devices {
		cfg := mlx5emu.Config{Name: fmt.Sprintf("mlx5_%d", i), Numbered: s.cfg.Numbered, Manual: s.cfg.Manual, L2Inline: s.cfg.L2Inline, InfiniBand: s.cfg.InfiniBand, Faults: faults}
		switch {
		case s.cfg.Trace != nil && s.cfg.Devices > 1:
			cfg.Trace = &labelled{mu: &lines, w: s.cfg.Trace, label: cfg.Name + " "}
		case s.cfg.Trace != nil:
			cfg.Trace = s.cfg.Trace
		}
		d, err := mlx5emu.NewDevice(cfg)
		if err != nil {
			return err
		}
		s.devices = append(s.devices, d)
	}
	return nil
}

// labelled puts the name of a device in front of lines, of which one comes a call.
type labelled struct {
	mu    *sync.Mutex
	w     io.Writer
	label string
}

func (l *labelled) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, err := io.WriteString(l.w, l.label); err != nil {
		return 0, err
	}
	return l.w.Write(p)
}

// serve answers calls until nobody is left who could make one. Each has a goroutine: some wait for peers.
func (s *Session) serve() {
	var all sync.WaitGroup
	for {
		c, err := s.process.Listener.Receive()
		if c == nil || err != nil {
			if err != nil {
				s.Signal(unix.SIGKILL) // nobody answers it any more
			}
			all.Wait()
			s.process.Listener.Close() // what is left of what it has started gets ENOSYS rather than to wait for ever
			s.served <- err
			return
		}
		all.Go(func() { s.handle(call{c}) })
	}
}

func (s *Session) handle(c call) {
	s.held.enter(c)
	defer s.held.leave(c)
	h, ok := calls[c.Number]
	var err error
	if !ok {
		err = c.Continue()
	} else {
		err = h(s, c)
	}
	if err == nil || errors.Is(err, errWithdrawn) {
		return
	}
	// The program must not wait for ever. It gets what the kernel says of the call.
	s.complain("system call %d of process %d: %v", c.Number, c.TID, err)
	c.Continue()
}

func (s *Session) complain(format string, args ...any) {
	if s.cfg.Log == nil {
		return
	}
	s.logs.Lock()
	defer s.logs.Unlock()
	fmt.Fprintf(s.cfg.Log, format+"\n", args...)
}

// Signal sends the program a signal.
func (s *Session) Signal(sig os.Signal) error { return s.process.Signal(sig) }

// Wait waits until the program has ended, and everything that it has started, and takes the devices away. It returns how the program
// has ended. It may be called again, with the same result.
func (s *Session) Wait() (syscall.WaitStatus, error) { return s.wait() }

func (s *Session) waitOnce() (syscall.WaitStatus, error) {
	st, err := s.process.Wait()
	err = errors.Join(err, s.drained())
	s.living.Wait() // the files have gone with the processes
	return st, errors.Join(err, s.end())
}

// drained waits until nobody is left who could make a call.
func (s *Session) drained() error {
	if !s.cfg.Reap {
		return <-s.served
	}
	for {
		reap()
		select {
		case err := <-s.served:
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// reap takes away the children of this process that are dead.
func reap() {
	for {
		if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.EINTR && pid <= 0 {
			return
		}
	}
}

func (s *Session) end() error {
	var errs []error
	if s.manager != nil {
		errs = append(errs, s.manager.Close())
	}
	for _, d := range s.devices {
		errs = append(errs, d.Close())
	}
	if s.tree != nil {
		s.tree.remove()
	}
	return errors.Join(errs...)
}
