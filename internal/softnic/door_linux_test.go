package softnic

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A peer that asks and asks and does not read the answers is cut off before they fill memory.
func TestPeerThatDoesNotRead(t *testing.T) {
	_, nb, _, _ := joined(t)
	l := nb.onlyLink(t)
	box := newMailbox[packet]()
	w := &socketWriter{box: box} // nobody empties it, as with a peer that does not read
	data := make([]byte, assistChunk)
	var err error
	sent := 0
	for ; err == nil && sent < outLimit; sent++ {
		err = w.send(ctl{kind: ctlAssisted, data: data})
	}
	if queued := sent * assistChunk; err != errLinkBusy || queued > 1<<30 {
		t.Errorf("%d bytes wait for the peer, and the error is %v", queued, err)
	}
	if l.reason() != nil {
		t.Error(l.reason())
	}
}

func knock(t testing.TB, n *NIC) *net.UnixConn {
	t.Helper()
	c, err := net.DialUnix("unixpacket", nil, observe.SocketName(n.gid))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// reachable checks that an honest NIC gets through.
func reachable(t testing.TB, n *NIC) {
	t.Helper()
	c := openNIC(t, true)
	if path, err := c.CheckReach(t.Context(), n.gid); err != nil || path != pathShm {
		t.Fatalf("an honest NIC: %q, %v", path, err)
	}
}

// Callers that say nothing, in any number, do not keep others out.
func TestSilentCallers(t *testing.T) {
	n := openNIC(t, true)
	if n.sharedE != nil {
		testutil.Skip(t, n.sharedE.Error())
	}
	var all []*net.UnixConn
	defer func() {
		for _, c := range all {
			c.Close()
		}
	}()
	count := 1000
	if lim := new(unix.Rlimit); unix.Getrlimit(unix.RLIMIT_NOFILE, lim) == nil && lim.Cur < 4096 {
		count = 400
	}
	for range count {
		all = append(all, knock(t, n))
	}
	reachable(t, n)
	for _, c := range all[:50] { // and they are sent away in the end
		c.SetReadDeadline(time.Now().Add(testutil.Patience))
		if _, err := c.Read(make([]byte, 10)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a silent caller is still there")
		}
	}
}

// Greetings that are none, or not this NIC's, are refused with the reason.
func TestBadGreetings(t *testing.T) {
	n, other := openNIC(t, true), openNIC(t, true)
	if n.sharedE != nil {
		testutil.Skip(t, n.sharedE.Error())
	}
	greet := func(change func(h *hello)) []byte {
		h := identity()
		h.from, h.to = ib.GID{0xfd, 1, 2}, n.gid
		change(&h)
		return h.encode()
	}
	table, err := unix.Open("/proc/self/fd/"+strconv.Itoa(other.liveReg.FD()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(table)
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for _, c := range []struct {
		name string
		b    []byte
		fds  []int
		why  string
	}{
		{"garbage", []byte("GET / HTTP/1.1"), nil, "no greeting"},
		{"truncated", greet(func(*hello) {})[:50], nil, "no greeting"},
		{"longer", append(greet(func(*hello) {}), 1, 2, 3, 4, 5), nil, ""},
		{"other GID", greet(func(h *hello) { h.to = other.gid }), nil, "another GID"},
		{"own GID", greet(func(h *hello) { h.from = n.gid }), []int{table}, "somebody else's"},
		{"no GID", greet(func(h *hello) { h.from = ib.GID{} }), []int{table}, "somebody else's"},
		{"other kernel", greet(func(h *hello) { h.boot[3]++ }), []int{table}, "different kernels"},
		{"other PID namespace", greet(func(h *hello) { h.pidNS++ }), []int{table}, "PID namespaces"},
		{"other mount namespace", greet(func(h *hello) { h.mntNS++ }), []int{table}, "mount namespaces"},
		{"no table", greet(func(*hello) {}), nil, "no region table"},
		{"two tables", greet(func(*hello) {}), []int{table, table}, ""},
		{"no memory", greet(func(*hello) {}), []int{int(null.Fd())}, "not a memory file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := knock(t, n)
			defer conn.Close()
			var oob []byte
			if c.fds != nil {
				oob = unix.UnixRights(c.fds...)
			}
			if _, _, err := conn.WriteMsgUnix(c.b, oob, nil); err != nil {
				t.Fatal(err)
			}
			conn.SetReadDeadline(time.Now().Add(testutil.Patience))
			b := make([]byte, 512)
			k, err := conn.Read(b)
			if c.why == "" {
				if err == nil && k > 0 {
					t.Errorf("answer %q", b[:k])
				}
				return
			}
			why, ok := strings.CutPrefix(string(b[:k]), observe.Refusal)
			if !ok || !strings.Contains(why, c.why) {
				t.Errorf("answer %q, %v; want %q", b[:k], err, c.why)
			}
		})
	}
	reachable(t, n)
}

// stranger is a process that tries to reach the NIC whose GID is its argument, and prints what comes of it.
func init() {
	testutil.RegisterChild("softnic.stranger", func(args []string) {
		n, err := Open()
		if err != nil {
			fmt.Println("open:", err)
			return
		}
		var g ib.GID
		hex.Decode(g[:], []byte(args[0]))
		path, err := n.CheckReach(context.Background(), g)
		fmt.Println("reach:", path, err)
		if err == nil && len(args) > 1 {
			mortal(n, g)
		}
		n.Close()
	})
}

// Processes that cannot share memory with us are told why.
func TestStrangers(t *testing.T) {
	n := openNIC(t, true)
	if n.sharedE != nil {
		testutil.Skip(t, n.sharedE.Error())
	}
	if os.Geteuid() != 0 {
		testutil.Skip(t, "other users and namespaces need root")
	}
	// The test binary may lie where another user cannot read it.
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "ringside-stranger")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	exe = filepath.Join(dir, "test")
	if os.Chmod(dir, 0o755) != nil || os.WriteFile(exe, b, 0o755) != nil {
		t.Fatal("no copy of the test binary")
	}
	for _, c := range []struct {
		name string
		attr syscall.SysProcAttr
		why  string
	}{
		{"same", syscall.SysProcAttr{}, "reach: shm <nil>"},
		{"user", syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}, "uid 65534 and uid 0 do not share memory"},
		{"pid", syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}, "PID namespaces"},
		{"mount", syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}, "mount namespaces"},
		{"network", syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}, "in this network namespace"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(exe, hex.EncodeToString(n.gid[:]))
			cmd.Env = append(os.Environ(), "RINGSIDE_TEST_CHILD=softnic.stranger")
			cmd.SysProcAttr = &c.attr
			in, err := cmd.StdinPipe() // open while the child runs: it ends with it
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			out, err := cmd.CombinedOutput()
			if errors.Is(err, syscall.EPERM) {
				testutil.Skip(t, "this process may not make such a child: "+err.Error())
			}
			if !strings.Contains(string(out), c.why) {
				t.Errorf("%v: it was told %q, want %q", err, out, c.why)
			}
		})
	}
	reachable(t, n)
}

// mortal is the child's half of TestPeersDie: it keeps a send queue of the parent's busy and sends to it until it is killed.
func mortal(n *NIC, g ib.GID) {
	t := childTB{}
	e := makeEnd(t, n, endConfig{typ: ib.RC, depth: 32, size: 64 << 10})
	fmt.Println("qpn:", e.q.QPN())
	var dst uint32
	fmt.Sscan(<-testutil.ChildInput(), &dst)
	e.connectTo(g, ib.QPN(dst))
	fmt.Println("ready:")
	var wcs [32]ib.WC
	for i := 0; ; i++ {
		e.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: e.sge(0, 4096)}})
		e.q.PostSend([]ib.SendWR{{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: e.sge(8192, 4096)}})
		e.cq.Poll(wcs[:])
	}
}

// childTB is what ends need of a test, in a child process.
type childTB struct{ testing.TB }

func (childTB) Helper()                      {}
func (childTB) Context() context.Context     { return context.Background() }
func (childTB) Fatal(args ...any)            { fmt.Println(args...); os.Exit(4) }
func (childTB) Fatalf(f string, args ...any) { fmt.Printf(f+"\n", args...); os.Exit(4) }
func (childTB) Errorf(f string, args ...any) { fmt.Printf(f+"\n", args...) }

// A peer that is killed in the middle of things: requests and receives of the survivor complete with errors, receives that
// it had claimed from a shared queue come back, and nothing is left.
func TestPeersDie(t *testing.T) {
	n := openNIC(t, true)
	if n.sharedE != nil {
		testutil.Skip(t, n.sharedE.Error())
	}
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	pd := allocPD(t, n)
	defer pd.Close()
	s := newTestSRQ(t, pd)
	defer s.Close()
	cq, err := n.CreateCQ(driver.CQConfig{Entries: 512})
	if err != nil {
		t.Fatal(err)
	}
	defer cq.Close()
	pool := heapBytes(4096) // of the shared queue: it outlives the QPs
	mr, err := pd.RegisterMR(driver.MRConfig{Mem: pool, FD: -1, Access: ib.AccessLocalWrite})
	if err != nil {
		t.Fatal(err)
	}
	defer mr.Close()
	maps, fds := 0, 0
	for i := range rounds {
		child := testutil.StartChild(t, "softnic.stranger", hex.EncodeToString(n.gid[:]), "mortal")
		var qpn uint32
		fmt.Sscan(child.Expect("qpn:"), &qpn)
		cfg := endConfig{typ: ib.RC, depth: 32, size: 64 << 10}
		if i%2 == 0 {
			cfg.srq = s
		}
		e := makeEndOn(t, n, pd, cq, cfg)
		child.Send(strconv.Itoa(int(e.q.QPN())))
		var g ib.GID
		testutil.Eventually(t, "the child's link is there", func() bool {
			n.eachLink(func(l *link) { g = l.peer })
			return !g.IsZero()
		})
		e.connectTo(g, ib.QPN(qpn))
		child.Expect("ready:")
		var wcs [32]ib.WC
		posted, done, failed := 0, 0, 0
		post := func() {
			wr := []ib.RecvWR{{ID: 1, SGEs: e.sge(0, 4096)}}
			k := 0
			if cfg.srq != nil {
				wr[0].SGEs = []ib.SGE{{Addr: addrOf(pool), Length: 4096, LKey: mr.LKey()}}
				k, _ = s.PostRecv(wr)
			} else {
				k, _ = e.q.PostRecv(wr)
			}
			posted += k
		}
		poll := func() {
			for _, wc := range wcs[:max(0, cq.Poll(wcs[:]))] {
				if wc.Opcode == ib.WCRecv {
					done++
				}
				if wc.Status != ib.WCSuccess {
					failed++
				}
			}
		}
		turn := func() {
			post()
			e.q.PostSend([]ib.SendWR{{ID: 2, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: e.sge(8192, 4096)}})
			poll()
		}
		testutil.Eventually(t, "messages arrive", func() bool {
			for range 100 {
				turn()
			}
			return done >= 20*(i+1) || failed > 0
		})
		if failed > 0 {
			t.Fatalf("round %d: %d requests have failed before the peer was killed", i, failed)
		}
		at := time.Now()
		killed := make(chan none)
		go func() { child.Kill(); close(killed) }()
		testutil.Eventually(t, "the survivor's QP is in the error state", func() bool {
			a, _ := e.q.Query()
			for range 100 {
				turn()
			}
			return a.State == ib.Err
		})
		t.Logf("noticed after %v", time.Since(at))
		<-killed
		e.q.PostSend([]ib.SendWR{{ID: 3, Opcode: ib.OpSend, Flags: ib.SendSignaled, SGEs: e.sge(0, 8)}})
		testutil.Eventually(t, "a request fails", func() bool { poll(); return failed > 0 })
		if cfg.srq == nil {
			testutil.Eventually(t, "every receive completes", func() bool { poll(); return done == posted })
		}
		e.close()
		if cfg.srq != nil { // what is left of the receives can be used by the next
			s.mu.Lock()
			used := s.used
			s.mu.Unlock()
			if used < 0 || used > s.max {
				t.Fatalf("%d receives of %d are in use", used, s.max)
			}
		}
		testutil.Eventually(t, "the link is gone", func() bool {
			n.mu.Lock()
			defer n.mu.Unlock()
			return len(n.links) == 0
		})
		if i == 1 {
			maps, fds = testutil.SharedMappings(), testutil.OpenFDs()
		}
	}
	testutil.Eventually(t, "no more is held than after the first of them", func() bool {
		return testutil.SharedMappings() <= maps && testutil.OpenFDs() <= fds
	})
}
