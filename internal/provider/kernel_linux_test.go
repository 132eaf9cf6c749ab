package provider_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/nldev"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What becomes of programs when something happens to the kernel's software devices that they use. The tests make devices of their own,
// on net devices of their own, in the machine of test/soft-roce.

func TestMain(m *testing.M) { testutil.Main(m) }

var background = context.Background()

// kinds are the drivers, by what the kernel calls them.
var kinds = []string{"rxe", "siw"}

// forKinds runs f for each driver.
func forKinds(t *testing.T, f func(t *testing.T, kind string)) {
	if os.Getenv("RINGSIDE_SOFT_ROCE") != "vm" {
		testutil.Skip(t, "go run ./test/soft-roce -- go test ./internal/provider has a kernel whose devices may be removed")
	}
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			testutil.CheckLeaks(t)
			f(t, kind)
		})
	}
}

// A device is an RDMA device of the test's own.
type device struct {
	*verbs.Context // which nobody closes but the test
	kind           string
	netdev         string
	addr           netip.Addr
}

// newDevice makes a device on one end of a veth pair, with an address, and opens it.
func newDevice(t testing.TB, kind, name string) *device {
	t.Helper()
	d := &device{kind: kind, netdev: name + "a", addr: netip.MustParseAddr("10.79.1.1")}
	ip(t, "link add "+d.netdev+" type veth peer name "+name+"b")
	t.Cleanup(func() {
		if !t.Failed() { // else it would wait for what is open on it
			ip(t, "link del "+d.netdev)
		}
	})
	ip(t, "link set "+name+"b up")
	d.add(t, name)
	return d
}

// newDevices makes one on either end. What one sends to the other passes the net devices.
func newDevices(t testing.TB, kind, name string) (a, b *device) {
	t.Helper()
	a = &device{kind: kind, netdev: name + "a", addr: netip.MustParseAddr("10.79.1.1")}
	b = &device{kind: kind, netdev: name + "b", addr: netip.MustParseAddr("10.79.1.2")}
	ip(t, "link add "+a.netdev+" address 02:00:00:00:79:01 type veth peer name "+b.netdev+" address 02:00:00:00:79:02")
	t.Cleanup(func() {
		if !t.Failed() {
			ip(t, "link del "+a.netdev)
		}
	})
	ip(t, "link set "+a.netdev+" up") // either has a carrier only once both are
	ip(t, "link set "+b.netdev+" up")
	for i, d := range []*device{a, b} {
		other, table := []*device{b, a}[i], fmt.Sprint(111+i)
		for file, value := range map[string]string{"rp_filter": "0", "accept_local": "1"} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+d.netdev+"/"+file, []byte(value), 0); err != nil {
				t.Fatal(err)
			}
		}
		d.add(t, name+fmt.Sprint(i))
		// As in the machine's own wiring: local addresses are looked for behind these rules only.
		rule := "pref " + fmt.Sprint(30+i) + " iif lo from " + d.addr.String() + " to " + other.addr.String() + " lookup " + table
		ip(t, "rule add "+rule)
		t.Cleanup(func() { ip(t, "rule del "+rule) })
		d.route(t, other)
	}
	return a, b
}

// route has what d sends to other leave by its net device: a net device that was down has lost that.
func (d *device) route(t testing.TB, other *device) {
	t.Helper()
	table := map[bool]string{true: "111", false: "112"}[d.addr.Less(other.addr)]
	last := other.addr.As4()[3]
	ip(t, fmt.Sprintf("neigh replace %v lladdr 02:00:00:00:79:%02x dev %s nud permanent", other.addr, last, d.netdev))
	ip(t, fmt.Sprintf("route replace %v dev %s src %v table %s", other.addr, d.netdev, d.addr, table))
}

// add gives the net device its address and the RDMA device, and opens that.
func (d *device) add(t testing.TB, name string) {
	t.Helper()
	ip(t, "link set "+d.netdev+" mtu 4200 up")
	ip(t, "addr add "+d.addr.String()+"/24 dev "+d.netdev)
	n, err := nldev.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.AddLink(name, d.kind, d.netdev); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			return // something may have it open still, and the machine is gone soon
		}
		if err := remove(name); err != nil {
			t.Error(err)
		}
	})
	if d.Context, err = verbs.Open(name); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "an active port with the address "+d.addr.String(), func() bool {
		p, err := d.QueryPort(1)
		return err == nil && p.State == ib.PortActive && (d.kind == "siw" || d.gid() >= 0)
	})
}

// remove deletes a device, which waits until its contexts are closed.
func remove(name string) error {
	n, err := nldev.Dial()
	if err != nil {
		return err
	}
	defer n.Close()
	return n.RemoveLink(name)
}

// gid is the slot of the device's address in its GID table, or -1.
func (d *device) gid() int {
	gids, err := d.GIDs(1)
	i := slices.IndexFunc(gids, func(g ib.GIDEntry) bool { return g.GID.Addr() == d.addr })
	if err != nil || i < 0 {
		return -1
	}
	return gids[i].Index
}

// ip runs the command.
func ip(t testing.TB, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
}

// A rig is a pair of connected queue pairs, and what belongs to them.
type rig struct {
	t    testing.TB
	a, b *node
}

// A node is one side of a rig.
type node struct {
	t    testing.TB
	dev  *device
	pd   *verbs.PD
	cq   *verbs.CQ
	m    *mr.MR // 64 KiB, open to all
	q    *qp.QP
	conn *qp.CMConn
}

func newNode(t testing.TB, d *device, ch *verbs.CompChannel) *node {
	t.Helper()
	n := &node{t: t, dev: d}
	var err error
	if n.pd, err = d.AllocPD(); err != nil {
		t.Fatal(err)
	}
	if n.cq, err = d.NewCQ(verbs.CQConfig{Channel: ch}); err != nil {
		t.Fatal(err)
	}
	if n.m, err = mr.Alloc(n.pd, 64<<10, ib.AccessLocalWrite|ib.AccessRemoteRead|ib.AccessRemoteWrite); err != nil {
		t.Fatal(err)
	}
	n.q = n.newQP()
	return n
}

// newQP is a queue pair in Init.
func (n *node) newQP() *qp.QP {
	n.t.Helper()
	q, err := qp.New(n.pd, &qp.Config{SendCQ: n.cq})
	if err == nil {
		err = q.Init(background, 1, ib.AccessRemoteRead|ib.AccessRemoteWrite)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	return q
}

func (n *node) close() {
	n.t.Helper()
	if n.conn != nil {
		n.conn.Close() // the connection may have ended by itself
	}
	testutil.Close(n.t, n.q, n.cq, n.m, n.pd)
}

// newRig connects a queue pair of a, whose completions tell ch if that is not nil, to one of b, which may be the same device.
func newRig(t testing.TB, a, b *device, ch *verbs.CompChannel) *rig {
	t.Helper()
	r := &rig{t, newNode(t, a, ch), newNode(t, b, nil)}
	if a.kind == "rxe" {
		for _, x := range [][2]*node{{r.a, r.b}, {r.b, r.a}} {
			from, to := x[0], x[1]
			p := qp.ConnectParams{Remote: qp.Endpoint{GID: ib.GIDFromAddr(to.dev.addr), QPN: to.q.QPN(), PSN: 7}, LocalPSN: 7, SGIDIndex: from.dev.gid()}
			if err := from.q.Connect(background, p); err != nil {
				t.Fatal(err)
			}
		}
		return r
	}
	l, err := qp.Listen(b.Context, netip.AddrPortFrom(b.addr, 0), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan error, 1)
	go func() {
		req, err := l.Accept(background)
		if err == nil {
			r.b.conn, err = req.Accept(background, r.b.q, qp.CMParams{})
		}
		accepted <- err
	}()
	if r.a.conn, err = r.a.q.Dial(background, netip.AddrPortFrom(a.addr, 0), l.Addr(), qp.CMParams{}); err != nil {
		t.Fatal(err)
	}
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) close() {
	r.t.Helper()
	r.a.close()
	r.b.close()
}

// write is an RDMA WRITE of n bytes from a to b, with a completion.
func (r *rig) write(n int) ib.SendWR {
	to := r.b.m.RemoteRange(0, n)
	return ib.SendWR{Opcode: ib.OpRDMAWrite, Flags: ib.SendSignaled, SGEs: []ib.SGE{r.a.m.SGE(0, n)}, RemoteAddr: to.Addr, RKey: to.RKey}
}

// within runs f, and fails the test if it does not return: what must not hang is called like this.
func within(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(testutil.Patience):
		t.Fatalf("%s hangs", what)
	}
}

func isRemoved(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, verbs.ErrDeviceRemoved) {
		t.Errorf("%s: %v, want %v", what, err, verbs.ErrDeviceRemoved)
	}
}
