package rpc

import (
	"fmt"
	"log/slog"
	"runtime/debug"
)

// PanicInfo describes a panic in a handler.
type PanicInfo struct {
	Method Method
	Name   string
	Value  any    // what was passed to panic; nil if the handler called runtime.Goexit
	Stack  []byte // of the goroutine that ran the handler
}

// logPanic is what happens to panics without ServerConfig.OnPanic.
func logPanic(p PanicInfo) {
	slog.Error("rpc: panic in handler", "method", p.Method, "name", p.Name, "value", fmt.Sprint(p.Value), "stack", string(p.Stack))
}

// panicError reports a panic and returns what the client is told: not the value, which may hold secrets.
func (s *Server) panicError(m *method, value any) *Error {
	info := PanicInfo{Method: m.id, Name: m.spec.Name, Value: value, Stack: debug.Stack()}
	func() {
		// A hook that panics must not take the server down in place of the handler that did not.
		defer func() { _ = recover() }()
		s.cfg.OnPanic(info)
	}()
	return &Error{Code: Internal, Message: "the handler panicked"}
}
