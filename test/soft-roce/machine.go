//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// A machine is a running virtual machine.
type machine struct {
	console *console
	ready   readyReport
	conn    *os.File      // the host's end of its port
	in      *bufio.Reader // of conn
	exited  chan struct{} // closed when QEMU has ended
	err     error         // how, once exited is closed
	process *os.Process
}

// bootTimeout is generous: booting takes 5 to 15 seconds where the processor is emulated by an idle host.
const bootTimeout = 3 * time.Minute

// bootVM starts a machine and waits until it is set up. dir is the run's own folder. The caller must stop the machine; it
// ends with this process, however that ends.
func bootVM(ctx context.Context, img *image, o *options, dir string) (*machine, error) {
	config := machineConfig{
		kernel: img.kernel(), initrd: filepath.Join(dir, "initrd"), socket: filepath.Join(dir, "vm"), work: workFolder(dir), out: o.out,
		arch: o.arch, memory: o.memory, cpus: o.cpus, kvm: o.arch.haveKVM(), verbose: o.verbose,
	}
	program, err := o.arch.program(ctx, dir)
	if err != nil {
		return nil, err
	}
	guest, err := json.Marshal(guestConfig{Bare: o.bare, Work: config.work, Out: o.out != ""})
	if err != nil {
		return nil, err
	}
	if err := writeInitrd(config, img.base(), program, guest); err != nil {
		return nil, fmt.Errorf("write the machine's initramfs: %w", err)
	}
	defer os.Remove(config.initrd) // once the machine is ready it has been read
	l, err := listenUnix(config.socket)
	if err != nil {
		return nil, err
	}
	defer l.Close()

	m := &machine{console: &console{start: time.Now()}, exited: make(chan struct{})}
	if o.verbose {
		m.console.verbose = os.Stderr
	}
	if err := m.start(config); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bootTimeout, fmt.Errorf("it was not ready after %v", bootTimeout))
	defer cancel()
	failed := make(chan error, 1)
	go func() { failed <- m.greet(l) }()
	select {
	case err = <-failed:
	case <-m.exited:
		err = fmt.Errorf("QEMU ended: %w", m.end())
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		m.stop()
		return nil, fmt.Errorf("the machine did not start: %w%s", err, m.console.tail())
	}
	return m, nil
}

// start starts QEMU. Its death signal is bound to the thread that starts it, so that one must live as long as QEMU does.
func (m *machine) start(c machineConfig) error {
	cmd := exec.Command(c.arch.qemu.name, qemuArgs(c)...)
	cmd.Stdout, cmd.Stderr = m.console, m.console
	// A group of its own: a terminal's Ctrl-C is for the command, and ends the machine by way of that.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread goes with the goroutine
		err := cmd.Start()
		m.process = cmd.Process
		started <- err
		if err == nil {
			m.err = cmd.Wait()
			close(m.exited)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start the machine: %w", err)
	}
	return nil
}

// greet takes the port's connection and waits for the machine's first words.
func (m *machine) greet(l *listener) error {
	conn, err := l.accept()
	if err != nil {
		return err
	}
	m.conn, m.in = conn, bufio.NewReaderSize(conn, 256<<10)
	f, err := readFrame(m.in)
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET):
		<-m.exited
		return fmt.Errorf("QEMU ended: %w", m.end())
	case err != nil:
		return fmt.Errorf("its port: %w", err)
	case f.kind == kindFailed:
		return errors.New(string(f.payload))
	case f.kind != kindReady:
		return fmt.Errorf("its port: %w: kind %d comes first", errBadFrame, f.kind)
	}
	return json.Unmarshal(f.payload, &m.ready)
}

// end says how QEMU ended. exited must be closed.
func (m *machine) end() error {
	if m.err == nil {
		return errors.New("exit status 0")
	}
	return m.err
}

// died returns err, or if the machine has ended by itself, that as the reason for whatever went wrong.
func (m *machine) died(err error) error {
	select {
	case <-m.exited:
		return fmt.Errorf("the machine ended before the command did: QEMU: %w%s", m.end(), m.console.tail())
	default:
		return err
	}
}

// stop ends the machine at once, and returns when it is gone.
func (m *machine) stop() {
	m.process.Kill() // it may be gone already
	<-m.exited
	if m.conn != nil {
		m.conn.Close()
	}
}
