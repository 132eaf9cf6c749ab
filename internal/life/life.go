// Package life gives the public objects (contexts, protection domains, queues, regions) one way to end: Close works
// once and can be called again, a parent refuses to close before its children, a child keeps its parent reachable,
// and an object that is dropped without Close is reported.
package life

import (
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/ringside-rdma/ringside/internal/driver"
)

// A Node is the lifetime of one object; embed it by value. The zero Node has no parents and is open.
//
// A Node is safe for concurrent use. Close holds its lock while the object is torn down, so that a child is either
// made before (and Close says busy) or refused after. Locks are taken from child to parent only.
type Node struct {
	mu      sync.Mutex
	closed  atomic.Bool
	kids    int
	parents []*Node
	cleanup runtime.Cleanup
	watched bool
}

// Attach makes n a child of each parent; a parent may appear twice. It fails with net.ErrClosed, and attaches to none,
// if one of them is closed.
func (n *Node) Attach(parents ...*Node) error {
	for i, p := range parents {
		p.mu.Lock()
		if p.closed.Load() {
			p.mu.Unlock()
			for _, q := range parents[:i] {
				q.release()
			}
			return net.ErrClosed
		}
		p.kids++
		p.mu.Unlock()
	}
	n.parents = parents
	return nil
}

// Abandon undoes Attach for an object that could not be made after all.
func (n *Node) Abandon() {
	n.closed.Store(true)
	for _, p := range n.parents {
		p.release()
	}
	n.parents = nil
}

func (n *Node) release() {
	n.mu.Lock()
	n.kids--
	n.mu.Unlock()
}

// Closed reports whether Close has succeeded. It costs one load.
func (n *Node) Closed() bool { return n.closed.Load() }

// Close runs teardown unless it has already succeeded. It fails with driver.ErrBusy while n has children; if teardown
// fails, n stays open. A Close that meets another one waits for it.
func (n *Node) Close(teardown func() error) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed.Load() {
		return nil
	}
	if n.kids > 0 {
		return fmt.Errorf("%w (%d left)", driver.ErrBusy, n.kids)
	}
	if err := teardown(); err != nil {
		return err
	}
	n.closed.Store(true)
	if n.watched {
		n.cleanup.Stop()
	}
	for _, p := range n.parents {
		p.release()
	}
	n.parents = nil
	return nil
}

// A Leak is an object that became garbage without Close. What it stood for (device objects, pinned or mapped memory)
// is left alone on purpose: a leak beats a device writing into memory that has been given to somebody else.
type Leak struct {
	Kind   string // "verbs.CQ"
	Device string // "soft0"
	At     string // file:line of the call that made it, outside of verbs, mr and qp
}

func (l Leak) String() string {
	return fmt.Sprintf("%s of %s, made at %s, was dropped without Close", l.Kind, l.Device, l.At)
}

var leakHook atomic.Pointer[func(Leak)]

// OnLeak sets what is called, on a goroutine of the runtime, for each leaked object, and returns what was set before;
// nil restores the default, a warning through log/slog. For tests.
func OnLeak(f func(Leak)) (old func(Leak)) {
	var p *func(Leak)
	if f != nil {
		p = &f
	}
	if o := leakHook.Swap(p); o != nil {
		return *o
	}
	return nil
}

type leakArg struct {
	kind, device string
	pcs          [12]uintptr
}

// Watch reports obj, which embeds n, as leaked when it becomes garbage before Close. It is called once, when obj is
// ready.
func Watch[T any](obj *T, n *Node, kind, device string) {
	a := &leakArg{kind: kind, device: device}
	runtime.Callers(2, a.pcs[:])
	n.cleanup = runtime.AddCleanup(obj, report, a)
	n.watched = true
}

func report(a *leakArg) {
	l := Leak{Kind: a.kind, Device: a.device, At: where(a.pcs[:])}
	if h := leakHook.Load(); h != nil {
		(*h)(l)
		return
	}
	slog.Warn("ringside: leak", "kind", l.Kind, "device", l.Device, "made", l.At)
}

// own are the packages whose frames say nothing: the object was made by whoever called them.
var own = []string{"internal/life.", "verbs.", "mr.", "qp."}

// where returns the innermost place outside of the packages that make objects, or failing that the outermost known.
func where(pcs []uintptr) string {
	place := "an unknown place"
	frames := runtime.CallersFrames(pcs)
	for {
		f, more := frames.Next()
		if f.File != "" {
			place = fmt.Sprintf("%s:%d", f.File, f.Line)
		}
		name, ours := strings.CutPrefix(f.Function, "github.com/ringside-rdma/ringside/")
		ours = ours && !strings.HasSuffix(f.File, "_test.go") &&
			slices.ContainsFunc(own, func(pkg string) bool { return strings.HasPrefix(name, pkg) })
		if !ours || !more {
			return place
		}
	}
}
