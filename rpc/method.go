package rpc

import (
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
)

// Method is a method's number on one connection. Numbers up to MaxMethod are chosen by the program and mean the same
// on every connection; larger ones are given out by a server for names, and a client learns them with Client.Method.
type Method uint32

// MaxMethod is the largest method number that a program can choose.
const MaxMethod Method = 1<<12 - 1

// firstNamed is the first number that stands for a name.
const firstNamed Method = 1 << 16

// String returns the number in decimal.
func (m Method) String() string { return strconv.FormatUint(uint64(m), 10) }

// Spec describes a method to register. At least one of Number and Name is needed.
type Spec struct {
	// Number calls the method without a look-up: 1 to MaxMethod. 0: the method has only a name.
	Number Method
	// Name, such as "kv.Store/Get", is resolved to a number once a connection. At most 255 bytes.
	Name string
	// Inline runs the handler on the goroutine that polls the connection, with no switch to another one: the fastest
	// way, for handlers that are short and never block. A blocking inline handler stalls every connection of its poller, and one
	// that calls runtime.Goexit ends it: there is nobody else to poll.
	// Default: handlers run on the server's workers.
	Inline bool
}

func (s *Spec) check() error {
	if s.Number == 0 && s.Name == "" {
		return fmt.Errorf("rpc: a method needs a number or a name")
	}
	if s.Number > MaxMethod {
		return fmt.Errorf("rpc: method number %d is over %d", s.Number, MaxMethod)
	}
	if s.Name != "" {
		return checkMethodName(s.Name)
	}
	return nil
}

// method is a registered method.
type method struct {
	spec    Spec
	id      Method // what a resolve of its name answers
	handler RawHandler
	metrics *methodMetrics // nil: off
}

// methodTable finds methods by number without a lock or a hash: readers load a snapshot, writers copy it.
type methodTable struct {
	mu   sync.Mutex // writers
	snap atomic.Pointer[methodSnap]
}

type methodSnap struct {
	numbered []*method          // index: number
	named    []*method          // index: number - firstNamed
	byName   map[string]*method // resolve
}

// add registers m and gives it its id.
func (t *methodTable) add(m *method) error {
	if err := m.spec.check(); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.snap.Load()
	if old == nil {
		old = &methodSnap{}
	}
	if n := int(m.spec.Number); n != 0 && n < len(old.numbered) && old.numbered[n] != nil {
		return fmt.Errorf("rpc: method %d is registered twice", n)
	}
	if old.byName[m.spec.Name] != nil {
		return fmt.Errorf("rpc: method %q is registered twice", m.spec.Name)
	}
	s := &methodSnap{named: old.named, numbered: old.numbered, byName: old.byName}
	if n := int(m.spec.Number); n != 0 {
		s.numbered = make([]*method, max(n+1, len(old.numbered)))
		copy(s.numbered, old.numbered)
		s.numbered[n] = m
		m.id = m.spec.Number
	} else {
		m.id = firstNamed + Method(len(old.named))
		s.named = append(old.named[:len(old.named):len(old.named)], m)
	}
	if m.spec.Name != "" {
		s.byName = make(map[string]*method, len(old.byName)+1)
		for k, v := range old.byName {
			s.byName[k] = v
		}
		s.byName[m.spec.Name] = m
	}
	t.snap.Store(s)
	return nil
}

// find returns the method with a number, or nil.
func (t *methodTable) find(n uint32) *method {
	s := t.snap.Load()
	if s == nil {
		return nil
	}
	if n < uint32(len(s.numbered)) {
		return s.numbered[n]
	}
	if i := n - uint32(firstNamed); n >= uint32(firstNamed) && i < uint32(len(s.named)) {
		return s.named[i]
	}
	return nil
}

// resolve returns the method with a name, or nil.
func (t *methodTable) resolve(name []byte) *method {
	s := t.snap.Load()
	if s == nil {
		return nil
	}
	return s.byName[string(name)]
}

// each calls f with every method.
func (t *methodTable) each(f func(*method)) {
	s := t.snap.Load()
	if s == nil {
		return
	}
	for _, m := range s.numbered {
		if m != nil {
			f(m)
		}
	}
	for _, m := range s.named {
		f(m)
	}
}
