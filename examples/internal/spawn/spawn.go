// Package spawn starts further processes of the running program, for examples that show several at once.
package spawn

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// A Process is a child that runs the same program with other arguments. Its methods are for one goroutine, but Kill and
// Done are for any.
type Process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines chan string   // what it prints; closed at the end
	mute  chan struct{} // closed when nobody will read lines any more
	once  sync.Once     // closes mute
	done  chan struct{}
	err   error // of Wait, once done is closed
}

// patience is how long a child that was asked to end may take.
const patience = 10 * time.Second

// Start starts this program with args. Its standard error goes to stderr; its standard output is read with Line. The
// end of its standard input tells it that the parent is gone (see WithParent). When ctx ends it is asked to stop in
// that way, and killed if it does not.
func Start(ctx context.Context, stderr io.Writer, args ...string) (*Process, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &Process{cmd: exec.CommandContext(ctx, exe, args...), done: make(chan struct{}),
		lines: make(chan string), mute: make(chan struct{})}
	p.cmd.Stderr = stderr
	p.cmd.WaitDelay = patience
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	p.cmd.Cancel = p.stdin.Close
	// Not StdoutPipe: its Wait must not be called before the last line was read, and ours is, to notice a death.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	p.cmd.Stdout = w
	if err := p.cmd.Start(); err != nil {
		r.Close()
		w.Close()
		return nil, fmt.Errorf("start another process of this program: %w", err)
	}
	w.Close() // the child has its own
	go p.read(r)
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *Process) read(r *os.File) {
	defer close(p.lines)
	defer r.Close()
	in := bufio.NewScanner(r)
	for in.Scan() {
		select {
		case p.lines <- in.Text():
		case <-p.mute:
		}
	}
	io.Copy(io.Discard, r) // after a line that is too long
}

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Line returns the next line that the child prints, without its end. The error is io.EOF when there are no more.
func (p *Process) Line() (string, error) {
	line, ok := <-p.lines
	if !ok {
		return "", io.EOF
	}
	return line, nil
}

// Expect returns the rest of the child's next line, which must start with prefix.
func (p *Process) Expect(prefix string) (string, error) {
	line, err := p.Line()
	rest, ok := strings.CutPrefix(line, prefix)
	if err != nil || !ok {
		return "", fmt.Errorf("process %d should print %q first, but %s", p.PID(), prefix, said(line, err))
	}
	return rest, nil
}

func said(line string, err error) string {
	if err != nil {
		return "ended without it"
	}
	return fmt.Sprintf("said %q", line)
}

// Done is closed when the process has ended; Err then says how.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err is nil while the process runs, and if it ended with status 0.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Kill ends the process at once, as kill -9 does, and waits until it is gone.
func (p *Process) Kill() {
	p.once.Do(func() { close(p.mute) })
	p.cmd.Process.Kill() // fails only if it has ended already
	<-p.done
}

// Stop asks the child to end by ending its standard input, kills it if it takes too long, and returns how it ended.
// What it has printed and nobody read is lost. Stopping twice is no error.
func (p *Process) Stop() error {
	p.once.Do(func() { close(p.mute) }) // lines that nobody reads must not hold it
	p.stdin.Close()
	return p.Wait()
}

// Wait waits for the child to end by itself, but not much longer than a moment.
func (p *Process) Wait() error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.err
	case <-timer.C:
		p.Kill()
		return fmt.Errorf("process %d did not end and was killed", p.PID())
	}
}

// WithParent returns a context that ends with the standard input: a child's, when its parent asks it to stop, or is
// gone. Call it once a process.
func WithParent(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return ctx, cancel
}
