//go:build linux

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// serveMachine is the server: it stands in the root that commands see, and starts them as the host asks. It returns when
// the host wants the machine off.
func serveMachine() error {
	p, err := openPort() // its device is in the initial root, too
	if err != nil {
		return err
	}
	defer p.Close()
	if err := unix.Chroot(guestRoot); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := raiseLimits(); err != nil {
		return err
	}
	s := &server{out: &frameWriter{w: p}, jobs: map[uint32]*job{}, cgroups: guestCgroups}
	report := readyReport{Uptime: uptime(), Devices: deviceNames()}
	if release, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		report.Kernel = strings.TrimSpace(string(release))
	}
	text, err := json.Marshal(report)
	if err != nil {
		return err
	}
	stage("ready")
	if err := s.out.send(kindReady, 0, text); err != nil {
		return err
	}
	return s.run(p)
}

// raiseLimits lets commands pin as much memory and open as many files as they like: tests of RDMA do.
func raiseLimits() error {
	const infinity = ^uint64(0)
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: infinity, Max: infinity}); err != nil {
		return fmt.Errorf("raise the limit of locked memory: %w", err)
	}
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1 << 16, Max: 1 << 20})
}

// A server starts commands. It reads requests in one goroutine, which never waits for a command.
type server struct {
	out     *frameWriter
	cgroups string // where the cgroups of commands are made; empty: they get none

	mu   sync.Mutex
	jobs map[uint32]*job
}

// run serves requests until power-off or the end of the stream, which means the same.
func (s *server) run(r io.Reader) error {
	in := bufio.NewReaderSize(r, 64<<10)
	for {
		f, err := readFrame(in)
		if errors.Is(err, io.EOF) || err == nil && f.kind == kindPowerOff {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a request: %w", err)
		}
		s.handle(f)
	}
}

func (s *server) handle(f frame) {
	if f.kind == kindExec {
		r, err := decodeExecRequest(f.payload)
		if err != nil {
			s.end(f.id, exitStatus{125, err.Error()})
			return
		}
		j := newJob(f.id, r, s.out)
		s.mu.Lock()
		s.jobs[f.id] = j
		s.mu.Unlock()
		go func() { s.end(f.id, j.run(s.cgroups)) }()
		return
	}
	s.mu.Lock()
	j := s.jobs[f.id]
	s.mu.Unlock()
	if j == nil {
		return // it has ended, and the host does not know yet
	}
	switch {
	case f.kind == kindStdin:
		j.input(f.payload)
	case f.kind == kindSignal && len(f.payload) == 1:
		j.signal(unix.Signal(f.payload[0]))
	case f.kind == kindKill:
		j.kill()
	}
}

// end forgets a command and tells the host how it ended. If that fails the host is gone, which run will see.
func (s *server) end(id uint32, status exitStatus) {
	s.mu.Lock()
	delete(s.jobs, id)
	s.mu.Unlock()
	_ = s.out.send(kindStatus, id, status.encode())
}

// defaultPath are the folders of programs.
var defaultPath = strings.Split("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", ":")

// lookPath finds a command the way a shell with the environment env in the folder dir does: exec.LookPath would take the
// server's own.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	path := strings.Join(defaultPath, ":")
	for _, e := range env {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			path = p + ":" + path // an ordinary user's has no sbin, and here one is root
		}
	}
	for folder := range strings.SplitSeq(path, ":") {
		if !strings.HasPrefix(folder, "/") {
			folder = dir + "/" + folder
		}
		file := folder + "/" + name
		if info, err := os.Stat(file); err == nil && !info.IsDir() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: no such command in PATH", strconv.Quote(name))
}
