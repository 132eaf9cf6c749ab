package conformance

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
)

// The control protocol between a script and a side in another process: frames of a 4-byte little-endian length and JSON,
// a request each one way, its answer the other. Requests are served concurrently.

// maxFrame bounds a control frame: some megabytes of memory contents in base64 fit.
const maxFrame = 64 << 20

type request struct {
	ID   uint64
	Op   string
	Args json.RawMessage
}

type response struct {
	ID    uint64
	Err   *flatError
	Reply json.RawMessage
}

func writeFrame(w io.Writer, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("control frame of %d bytes: at most %d", len(b), maxFrame)
	}
	_, err = w.Write(append(binary.LittleEndian.AppendUint32(make([]byte, 0, 4+len(b)), uint32(len(b))), b...))
	return err
}

func readFrame(r io.Reader, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n > maxFrame {
		return fmt.Errorf("control frame of %d bytes: at most %d", n, maxFrame)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// flatError is an error reduced to what travels: its text, and which of the known sentinels it matches. Both kinds of
// side give it to the script, so a case cannot see the difference.
type flatError struct {
	Msg   string
	Kinds []string
}

func (e *flatError) Error() string { return e.Msg }

func (e *flatError) Is(target error) bool {
	for _, k := range e.Kinds {
		if sentinels[k] == target {
			return true
		}
	}
	return false
}

var sentinels = map[string]error{
	"busy":        verbs.ErrBusy,
	"queue full":  verbs.ErrQueueFull,
	"state":       verbs.ErrState,
	"removed":     verbs.ErrDeviceRemoved,
	"invalid":     verbs.ErrInvalidWR,
	"unreachable": verbs.ErrUnreachable,
	"closed":      net.ErrClosed,
	"unsupported": errors.ErrUnsupported,
	"deadline":    context.DeadlineExceeded,
	"transition":  errTransition,
	"not there":   errNotThere,
}

// errTransition stands for a *qp.StateError.
var errTransition = errors.New("a *qp.StateError")

// errNotThere: the script used a handle that is gone; a bug of the script.
var errNotThere = errors.New("no such object")

func flatten(err error) error {
	if err == nil {
		return nil
	}
	if f, ok := err.(*flatError); ok {
		return f
	}
	f := &flatError{Msg: err.Error()}
	for k, s := range sentinels {
		if errors.Is(err, s) {
			f.Kinds = append(f.Kinds, k)
		}
	}
	if se := (*qp.StateError)(nil); errors.As(err, &se) {
		f.Kinds = append(f.Kinds, "transition")
	}
	return f
}

// An op is something that a side can do.
type op[A, R any] struct {
	name string
	run  func(*host, A) (R, error)
}

type served interface {
	serve(h *host, args json.RawMessage) (any, error)
}

func (o *op[A, R]) serve(h *host, args json.RawMessage) (any, error) {
	var a A
	if err := json.Unmarshal(args, &a); err != nil {
		return nil, err
	}
	return o.run(h, a)
}

var ops = map[string]served{}

func newOp[A, R any](name string, run func(*host, A) (R, error)) *op[A, R] {
	if ops[name] != nil {
		panic("conformance: operation defined twice: " + name)
	}
	o := &op[A, R]{name, run}
	ops[name] = o
	return o
}

// call does o on the side: directly, or by a control message.
func call[A, R any](s *Side, o *op[A, R], a A) (R, error) {
	start := time.Now()
	defer func() {
		if d := time.Since(start); d > slow {
			s.c.Logf("%s: %s took %v", s.name, o.name, d)
		}
	}()
	if s.local != nil {
		r, err := o.run(s.local, a)
		return r, flatten(err)
	}
	var r R
	err := s.remote.roundTrip(o.name, a, &r)
	return r, err
}

// do is call for what must succeed.
func do[A, R any](s *Side, o *op[A, R], a A) R {
	s.c.Helper()
	r, err := call(s, o, a)
	if err != nil {
		s.c.Fatalf("%s: %s: %v", s.name, o.name, err)
	}
	return r
}

// peerEnv marks the process that is the other side.
const peerEnv = "RINGSIDE_CONFORMANCE_PEER"

// ServePeer serves control messages, until the script's process closes the pipe or ends, and does not return, if this process was
// started as the other side; otherwise it does nothing. A program that calls Run calls this first.
func ServePeer() {
	if os.Getenv(peerEnv) == "" {
		return
	}
	in, out := os.Stdin, os.Stdout
	os.Stdout = os.Stderr // nothing else may write to the control pipe
	// A terminal interrupts this process, too; when it ends is up to the script.
	signal.Ignore(os.Interrupt)
	h := newHost()
	var mu sync.Mutex // guards out
	for {
		var req request
		if err := readFrame(in, &req); err != nil {
			if err != io.EOF {
				fmt.Fprintln(os.Stderr, "peer: control pipe:", err)
			}
			os.Exit(0)
		}
		go func() {
			resp := response{ID: req.ID}
			o := ops[req.Op]
			if o == nil {
				resp.Err = &flatError{Msg: "unknown operation " + req.Op}
			} else if r, err := o.serve(h, req.Args); true {
				if err != nil {
					resp.Err = flatten(err).(*flatError)
				}
				if resp.Reply, err = json.Marshal(r); err != nil {
					resp.Err = &flatError{Msg: err.Error()}
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if err := writeFrame(out, &resp); err != nil {
				fmt.Fprintln(os.Stderr, "peer: control pipe:", err)
				os.Exit(1)
			}
		}()
	}
}

var errPeerGone = errors.New("the other process has ended")

// slow is how long an operation may take before the log of the case mentions it.
const slow = 2 * time.Second

// controlTimeout bounds one control message; the longest wait that a side does itself is patience.
const controlTimeout = 3 * patience

// A peer is a process that serves as the other side.
type peer struct {
	cmd       *exec.Cmd
	namespace string // that it runs in; empty: this process's

	in   io.WriteCloser
	gone chan struct{} // closed when the process has ended
	log  lockedBuffer

	stopped, killed atomic.Bool // it was asked to end, or made to; set before that

	sendMu  sync.Mutex
	mu      sync.Mutex
	next    uint64
	waiting map[uint64]chan *response
}

type lockedBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.b) < 1<<20 {
		l.b = append(l.b, p...)
	}
	return len(p), nil
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}

// startPeer starts the other process, in a network namespace if it has a name.
func startPeer(namespace string) (*peer, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &peer{cmd: exec.Command(exe), gone: make(chan struct{}), waiting: map[uint64]chan *response{}}
	if namespace != "" {
		p.cmd = exec.Command("ip", "netns", "exec", namespace, exe)
	}
	p.namespace = namespace
	p.cmd.Env = append(os.Environ(), peerEnv+"=1")
	p.cmd.Stderr = &p.log
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		for {
			resp := new(response)
			if readFrame(out, resp) != nil {
				break
			}
			p.mu.Lock()
			ch := p.waiting[resp.ID]
			delete(p.waiting, resp.ID)
			p.mu.Unlock()
			if ch != nil {
				ch <- resp
			}
		}
		p.cmd.Wait() // what it returns, failure makes of ProcessState
		close(p.gone)
	}()
	return p, nil
}

// kill ends the process as kill -9 does, and waits until it is gone.
func (p *peer) kill() {
	p.killed.Store(true)
	p.cmd.Process.Kill()
	<-p.gone
}

// stop asks the process to end by closing its control pipe, waits until it is gone, and returns what failure does.
func (p *peer) stop() error {
	p.stopped.Store(true)
	p.in.Close()
	select {
	case <-p.gone:
		return p.failure()
	case <-time.After(patience):
		p.kill()
		return fmt.Errorf("the other process did not end within %v; its output:\n%s", patience, p.log.String())
	}
}

// hasEnded reports whether the process is gone; of one that is being killed, once it is.
func (p *peer) hasEnded() bool {
	if p.killed.Load() {
		<-p.gone
		return true
	}
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

// raceFound is in what the race detector writes. A process that is killed has no status that tells of it.
const raceFound = "WARNING: DATA RACE"

// failure returns an error, with what the process has written, if it has ended otherwise than it was made to: by a panic or by itself,
// or with the status of the race detector. It is gone.
func (p *peer) failure() error {
	how, out := p.cmd.ProcessState, p.log.String()
	switch {
	case p.killed.Load() && how.ExitCode() < 0 && !strings.Contains(out, raceFound): // no status: by a signal
		return nil
	case p.stopped.Load() && how.Success():
		return nil
	}
	return fmt.Errorf("the other process has ended: %v; its output:\n%s", how, out)
}

func (p *peer) roundTrip(name string, args, reply any) error {
	b, err := json.Marshal(args)
	if err != nil {
		return err
	}
	ch := make(chan *response, 1)
	p.mu.Lock()
	p.next++
	id := p.next
	p.waiting[id] = ch
	p.mu.Unlock()
	p.sendMu.Lock()
	err = writeFrame(p.in, &request{ID: id, Op: name, Args: b})
	p.sendMu.Unlock()
	if err != nil && !errors.Is(err, syscall.EPIPE) { // that: it is about to be gone
		return fmt.Errorf("%w: %v", errPeerGone, err)
	}
	timer := time.NewTimer(controlTimeout)
	defer timer.Stop()
	select {
	case resp := <-ch:
		if len(resp.Reply) > 0 {
			if err := json.Unmarshal(resp.Reply, reply); err != nil {
				return err
			}
		}
		if resp.Err != nil {
			return resp.Err
		}
		return nil
	case <-p.gone:
		return errPeerGone
	case <-timer.C:
		return fmt.Errorf("%s: no answer from the other process within %v", name, controlTimeout)
	}
}
