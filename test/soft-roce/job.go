//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A job is a command that the server runs.
type job struct {
	id      uint32
	request execRequest
	out     *frameWriter
	stdin   chan []byte   // room for one piece: the host sends the next when it has been taken
	done    chan struct{} // closed when the command has ended

	mu     sync.Mutex
	pid    int    // of the process group; 0: not started yet, or ended
	killed bool   // before it was started
	cgroup string // empty: none
}

func newJob(id uint32, r execRequest, out *frameWriter) *job {
	return &job{id: id, request: r, out: out, stdin: make(chan []byte, 1), done: make(chan struct{})}
}

// run runs the command to its end, and ends what it has left running: a process that holds on to a device or to a port
// would disturb whatever comes next.
func (j *job) run(cgroups string) exitStatus {
	defer close(j.done)
	path, err := lookPath(j.request.argv[0], j.request.dir, j.request.env)
	if err != nil {
		return exitStatus{127, err.Error()}
	}
	cmd := &exec.Cmd{
		Path: path, Args: j.request.argv, Env: j.request.env, Dir: j.request.dir,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
		WaitDelay:   2 * time.Second, // for the output of what it has left running
	}
	cmd.Stdout = &stream{j.out, kindStdout, j.id}
	cmd.Stderr = cmd.Stdout
	if !j.request.merge {
		cmd.Stderr = &stream{j.out, kindStderr, j.id}
	}
	if cgroups != "" {
		folder, err := makeCgroup(cgroups, j.id)
		if err != nil {
			return exitStatus{125, err.Error()}
		}
		defer folder.Close()
		defer removeCgroup(folder.Name())
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(folder.Fd())
		j.mu.Lock()
		j.cgroup = folder.Name()
		j.mu.Unlock()
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return exitStatus{125, err.Error()}
	}
	if err := j.start(cmd); err != nil {
		in.Close()
		code := uint32(126)
		if errors.Is(err, os.ErrNotExist) {
			code = 127
		}
		return exitStatus{code, err.Error()}
	}
	go j.feed(in)
	err = cmd.Wait()
	j.mu.Lock()
	j.pid = 0
	j.mu.Unlock()
	j.kill()
	return statusOf(cmd.ProcessState, err)
}

// start starts the command unless it was killed before.
func (j *job) start(cmd *exec.Cmd) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.killed {
		return errors.New("killed before it was started")
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	j.pid = cmd.Process.Pid
	return nil
}

func statusOf(p *os.ProcessState, err error) exitStatus {
	if p == nil {
		return exitStatus{125, err.Error()}
	}
	if w, ok := p.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return exitStatus{code: 128 + uint32(w.Signal())}
	}
	return exitStatus{code: uint32(p.ExitCode())}
}

// input takes a piece of input, or its end. It never waits: there is room for the one piece that the host may send.
func (j *job) input(p []byte) {
	select {
	case j.stdin <- p:
	default:
		j.kill() // the host does not keep to the protocol
	}
}

// feed hands the input on. The pipe may take long, or nobody may read it any more.
func (j *job) feed(in io.WriteCloser) {
	defer in.Close()
	for {
		select {
		case p := <-j.stdin:
			if len(p) == 0 {
				return
			}
			_, err := in.Write(p) // fails if the command has closed its input: it may go on without
			if err != nil {
				in.Close()
			}
			if j.out.send(kindTaken, j.id, nil) != nil {
				return
			}
		case <-j.done:
			return
		}
	}
}

func (j *job) signal(s unix.Signal) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.pid != 0 {
		_ = unix.Kill(-j.pid, s) // it may have ended by itself
	}
}

// kill ends the command and all that it has started, wherever that went.
func (j *job) kill() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.killed = true
	if j.cgroup != "" {
		_ = os.WriteFile(j.cgroup+"/cgroup.kill", []byte("1"), 0) // gone: then so are the processes
	}
	if j.pid != 0 {
		_ = unix.Kill(-j.pid, unix.SIGKILL)
	}
}

func makeCgroup(parent string, id uint32) (*os.File, error) {
	name := fmt.Sprintf("%s/job%d", parent, id)
	if err := os.Mkdir(name, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	return os.Open(name)
}

// removeCgroup removes a cgroup once its processes, which have been killed, are gone.
func removeCgroup(name string) {
	for range 100 {
		if os.Remove(name) == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}
