package life

import (
	"errors"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func ok() error { return nil }

func TestParentWaitsForChildren(t *testing.T) {
	var parent, other, a, b Node
	if err := a.Attach(&parent, &other, &parent); err != nil { // twice: a queue pair with one CQ for both queues
		t.Fatal(err)
	}
	if err := b.Attach(&parent); err != nil {
		t.Fatal(err)
	}
	if err := parent.Close(ok); !errors.Is(err, driver.ErrBusy) || !strings.Contains(err.Error(), "3 left") {
		t.Fatalf("Close with children: %v", err)
	}
	if parent.Closed() {
		t.Fatal("closed although busy")
	}
	if err := a.Close(ok); err != nil {
		t.Fatal(err)
	}
	if err := other.Close(ok); err != nil {
		t.Fatal(err)
	}
	b.Abandon()
	if err := parent.Close(ok); err != nil {
		t.Fatal(err)
	}
	if err := parent.Close(func() error { t.Error("torn down twice"); return nil }); err != nil {
		t.Fatal(err)
	}
}

func TestAttachToClosed(t *testing.T) {
	var open, closed, child Node
	closed.Close(ok)
	if err := child.Attach(&open, &closed); !errors.Is(err, net.ErrClosed) {
		t.Fatal(err)
	}
	if err := open.Close(ok); err != nil {
		t.Fatalf("a failed Attach leaves a child behind: %v", err)
	}
}

func TestFailedCloseStaysOpen(t *testing.T) {
	var n, child Node
	bad := errors.New("bad")
	if err := n.Close(func() error { return bad }); err != bad || n.Closed() {
		t.Fatal(err, n.Closed())
	}
	if err := child.Attach(&n); err != nil {
		t.Fatal(err)
	}
}

// A child is made before its parent's Close, which then says busy, or is refused: never anything else.
func TestCloseRacesWithAttach(t *testing.T) {
	for range 200 {
		var parent Node
		var wg sync.WaitGroup
		children := make([]Node, 4)
		for i := range children {
			wg.Go(func() {
				if err := children[i].Attach(&parent); err != nil {
					return
				}
				if parent.Closed() {
					t.Error("child of a closed parent")
				}
				children[i].Close(ok)
			})
		}
		wg.Go(func() {
			for parent.Close(ok) != nil {
				runtime.Gosched()
			}
		})
		wg.Wait()
	}
}

type thing struct {
	life Node
	_    [100]byte
}

//go:noinline
func drop(closeIt bool) {
	x := &thing{}
	Watch(x, &x.life, "life.thing", "dev0")
	if closeIt {
		x.life.Close(ok)
	}
}

func TestLeakIsReported(t *testing.T) {
	got := make(chan Leak, 10)
	old := OnLeak(func(l Leak) { got <- l })
	defer OnLeak(old)
	drop(true)
	drop(false)
	var l Leak
	testutil.Eventually(t, "leak reported", func() bool {
		runtime.GC()
		select {
		case l = <-got:
			return true
		default:
			return false
		}
	})
	if l.Kind != "life.thing" || l.Device != "dev0" || !strings.Contains(l.String(), "dropped without Close") || !strings.Contains(l.At, "life_test.go:") {
		t.Errorf("got %+v", l)
	}
	runtime.GC()
	select {
	case l := <-got:
		t.Errorf("a closed object was reported: %v", l)
	default:
	}
}
