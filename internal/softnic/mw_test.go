package softnic

import (
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A boundable is a region, a window, and a queue pair that can bind one to the other.
type boundable struct {
	*end
	mr  driver.MR
	r   *region
	w   *MW
	key ib.RKey
}

func newBoundable(t *testing.T) *boundable {
	t.Helper()
	n := openNIC(t, false)
	x := &boundable{end: newEnd(t, n, endConfig{typ: ib.RC, size: 4096})}
	peer := newEnd(t, n, endConfig{typ: ib.RC, size: 4096})
	x.connect(peer)
	peer.connect(x.end)
	var err error
	if x.mr, err = x.pd.RegisterMR(driver.MRConfig{Mem: heapBytes(4096), FD: -1, Access: ib.AccessLocalWrite | ib.AccessMWBind}); err != nil {
		t.Fatal(err)
	}
	w, err := x.pd.(*PD).AllocMW()
	if err != nil {
		t.Fatal(err)
	}
	x.w, x.r, x.key = w.(*MW), n.regions.lookupRKey(x.mr.RKey()), w.RKey()^1
	t.Cleanup(func() {
		x.w.Close()
		x.mr.Close()
	})
	return x
}

// bind posts a request that binds the window to all of the region.
func (x *boundable) bind() {
	x.t.Helper()
	x.send(ib.SendWR{ID: 1, Opcode: ib.OpBindMW, Flags: ib.SendSignaled, Bind: &ib.BindMW{Window: x.w.Handle(), MRLKey: x.mr.LKey(), RKey: x.key,
		Addr: x.r.base, Length: x.r.length, Access: ib.AccessRemoteWrite}})
}

// waitsIn waits until a goroutine waits for a mutex that is locked by the function itself.
func waitsIn(t *testing.T, function string) {
	t.Helper()
	testutil.Eventually(t, "somebody waits in "+function, func() bool {
		b := make([]byte, 1<<20)
		for _, g := range strings.Split(string(b[:runtime.Stack(b, true)]), "\n\n") {
			why, _, _ := strings.Cut(g, "\n")
			_, innermost, _ := strings.Cut(g, "/softnic.")
			if strings.Contains(why, "Mutex.Lock") && strings.HasPrefix(innermost, function+"(") {
				return true
			}
		}
		return false
	})
}

// A region that is closed while a window is bound to it is closed, or has the window, but not both.
func TestRegionIsClosedWhileAWindowIsBound(t *testing.T) {
	x := newBoundable(t)
	bound, closed := make(chan none), make(chan error, 1)
	x.w.mu.Lock()
	unlock := sync.OnceFunc(x.w.mu.Unlock)
	defer unlock()
	go func() {
		defer close(bound)
		x.bind()
	}()
	waitsIn(t, "(*QP).bind") // it has found the region
	go func() { closed <- x.mr.Close() }()
	testutil.Eventually(t, "the region is revoked", func() bool { return x.n.regions.lookup(x.r.handle) == nil })
	unlock()
	<-bound
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if wc := x.poll(); wc.Status != ib.WCMWBindErr {
		t.Errorf("bind: %+v", wc)
	}
	if x.n.regions.lookupRKey(x.key) != nil {
		t.Error("the window's key is alive, although the region is closed")
	}
	if err := x.mr.Close(); err != driver.ErrClosed {
		t.Errorf("closed again: %v", err)
	}
}

// While a window's key is alive, its region is in use: whoever closes the region does not wait for those who use the window else.
func TestRegionIsInUseUntilTheWindowIsDead(t *testing.T) {
	x := newBoundable(t)
	x.bind()
	if wc := x.poll(); wc.Status != ib.WCSuccess {
		t.Fatalf("bind: %+v", wc)
	}
	if err := x.mr.Close(); !errors.Is(err, driver.ErrBusy) {
		t.Errorf("a window is bound: %v", err)
	}
	closed := make(chan error, 1)
	table := &x.n.regions
	table.mu.Lock()
	unlock := sync.OnceFunc(table.mu.Unlock)
	defer unlock()
	go func() { closed <- x.w.Close() }()
	waitsIn(t, "(*regionTable).revoke")
	if x.r.windows.Load() != 1 {
		t.Errorf("%d windows are counted while one's key is alive", x.r.windows.Load())
	} else if err := x.mr.Close(); !errors.Is(err, driver.ErrBusy) {
		t.Errorf("a window's key is alive: %v", err)
	}
	unlock()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := x.mr.Close(); err != nil {
		t.Errorf("after the window: %v", err)
	}
}
