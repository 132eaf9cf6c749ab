package conformance

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
)

// Run runs the table on a device, or between two, without package testing: the sides meet within this process, then in two processes,
// in both roles. It tells report how each case has ended, and goes on behind failures; a second process that fails behind its last case is
// told as one more. An error says that the sides did not even connect, or that ctx has ended, which is looked at between cases. One Run
// a process; see ServePeer.
func Run(ctx context.Context, o Options, report func(Result)) error {
	options = o
	for _, p := range []path{pathInProcess, pathProcesses, pathProcessesBA} {
		if p.twoProcesses && runtime.GOOS != "linux" {
			continue
		}
		var first string // the log of the warm-up, which is no case
		run := func(name string, f func(T)) bool {
			if ctx.Err() != nil {
				return false
			}
			t := newScript(name)
			t.play(f)
			if first == "" && t.Failed() {
				first = t.Logged()
			}
			return !t.Failed()
		}
		if err := eachCase(p, run, report); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if !errors.Is(err, errNotConnected) {
				report(Result{Case: "end of the other process", Path: p.name, Outcome: Failed, Log: err.Error()})
				continue
			}
			return fmt.Errorf("%s: %w\n%s", p.name, err, strings.TrimSpace(first))
		}
	}
	return ctx.Err()
}

// A script is the T of one case that Run runs.
type script struct {
	name string

	mu       sync.Mutex
	log      strings.Builder
	failed   bool
	skipped  bool
	cleanups []func()
}

func newScript(name string) *script { return &script{name: name} }

// play runs f, and what it has left to be done behind it, as package testing does: on a goroutine, which Fatal and Skip end.
func (s *script) play(f func(T)) {
	s.protect(func() { f(s) })
	for {
		s.mu.Lock()
		k := len(s.cleanups) - 1
		if k < 0 {
			s.mu.Unlock()
			return
		}
		f := s.cleanups[k]
		s.cleanups = s.cleanups[:k]
		s.mu.Unlock()
		s.protect(f)
	}
}

// protect runs f on a goroutine of its own. A panic is a failure.
func (s *script) protect(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				s.Errorf("panic: %v\n%s", p, debug.Stack())
			}
		}()
		f()
	}()
	<-done
}

func (s *script) Name() string { return s.name }

func (s *script) Helper() {}

func (s *script) Log(args ...any) { s.say(fmt.Sprintln(args...)) }

func (s *script) Logf(format string, args ...any) { s.say(fmt.Sprintf(format, args...)) }

// say notes a line, and where in the table it was said.
func (s *script) say(text string) {
	where := ""
	pc := make([]uintptr, 16)
	frames := runtime.CallersFrames(pc[:runtime.Callers(3, pc)])
	for {
		f, more := frames.Next()
		if file := filepath.Base(f.File); strings.HasPrefix(file, "cases_") {
			where = fmt.Sprintf("%s:%d: ", file, f.Line)
			break
		}
		if !more {
			break
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log.WriteString(where + strings.TrimRight(text, "\n") + "\n")
}

func (s *script) fail() {
	s.mu.Lock()
	s.failed = true
	s.mu.Unlock()
}

func (s *script) Error(args ...any) {
	s.say(fmt.Sprintln(args...))
	s.fail()
}

func (s *script) Errorf(format string, args ...any) {
	s.say(fmt.Sprintf(format, args...))
	s.fail()
}

func (s *script) Fatal(args ...any) {
	s.say(fmt.Sprintln(args...))
	s.fail()
	runtime.Goexit()
}

func (s *script) Fatalf(format string, args ...any) {
	s.say(fmt.Sprintf(format, args...))
	s.fail()
	runtime.Goexit()
}

func (s *script) Skip(args ...any) {
	s.say(fmt.Sprintln(args...))
	s.mu.Lock()
	s.skipped = true
	s.mu.Unlock()
	runtime.Goexit()
}

func (s *script) Failed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

func (s *script) Skipped() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.skipped && !s.failed
}

func (s *script) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleanups = append(s.cleanups, f)
}

// Logged returns what was said so far.
func (s *script) Logged() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}
