package rxe_test

import (
	"context"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/mr"
	"github.com/ringside-rdma/ringside/qp"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// vmOnly skips tests that change the machine that they run on.
func vmOnly(t testing.TB) {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") != "vm" {
		testutil.Skip(t, "go run ./test/soft-roce -- go test ./internal/provider/rxe has a kernel whose devices may be removed")
	}
}

// kernelDevice opens rxe0, which soft-roce has made.
func kernelDevice(t testing.TB) *verbs.Context {
	t.Helper()
	if os.Getenv("RINGSIDE_SOFT_ROCE") == "" {
		testutil.Skip(t, "go run ./test/soft-roce -- go test ./internal/provider/rxe has devices")
	}
	c, err := verbs.Open("rxe0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { testutil.Close(t, c) })
	return c
}

// gidIndex is the slot of an IPv4 address in the device's GID table, or -1.
func gidIndex(c *verbs.Context) int {
	gids, err := c.GIDs(1)
	if err != nil {
		return -1
	}
	for i := range gids {
		if a := netip.AddrFrom16(gids[i].GID); a.Is4In6() {
			return gids[i].Index
		}
	}
	return -1
}

// rig is a protection domain with what is made on it for a pair of connected queue pairs of one device.
type rig struct {
	t    testing.TB
	c    *verbs.Context
	pd   *verbs.PD
	cq   *verbs.CQ
	a, b *qp.QP
	m    *mr.MR // 64 KiB, open to all
}

func newRig(t testing.TB, c *verbs.Context, ch *verbs.CompChannel) *rig {
	t.Helper()
	r := &rig{t: t, c: c}
	var err error
	if r.pd, err = c.AllocPD(); err != nil {
		t.Fatal(err)
	}
	if r.cq, err = c.NewCQ(verbs.CQConfig{Channel: ch}); err != nil {
		t.Fatal(err)
	}
	if r.m, err = mr.Alloc(r.pd, 64<<10, ib.AccessLocalWrite|ib.AccessRemote|ib.AccessMWBind); err != nil {
		t.Fatal(err)
	}
	r.a, r.b = r.newQP(), r.newQP()
	gid, err := c.GID(1, gidIndex(c))
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range [][2]*qp.QP{{r.a, r.b}, {r.b, r.a}} {
		p := qp.ConnectParams{Remote: qp.Endpoint{GID: gid, QPN: x[1].QPN(), PSN: 7}, LocalPSN: 7, SGIDIndex: gidIndex(c)}
		if err := x[0].Connect(background, p); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func (r *rig) newQP() *qp.QP {
	r.t.Helper()
	q, err := qp.New(r.pd, &qp.Config{SendCQ: r.cq})
	if err == nil {
		err = q.Init(background, 1, ib.AccessRemote)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return q
}

func (r *rig) close() {
	r.t.Helper()
	testutil.Close(r.t, r.a, r.b, r.cq, r.m, r.pd)
}

// wait polls n completions, which must be good ones.
func (r *rig) wait(n int) {
	r.t.Helper()
	wcs := make([]ib.WC, 8)
	for deadline := time.Now().Add(testutil.Patience); n > 0; {
		got, err := r.cq.Poll(wcs[:min(n, len(wcs))])
		if err != nil {
			r.t.Fatal(err)
		}
		for i := range wcs[:got] {
			if err := verbs.CheckWC("", &wcs[i]); err != nil {
				r.t.Fatal(err)
			}
		}
		n -= got
		if got == 0 && time.Now().After(deadline) {
			r.t.Fatalf("%d completions are missing", n)
		}
	}
}

// do posts a request on side a, and waits until it is done.
func (r *rig) do(wr ib.SendWR) {
	r.t.Helper()
	wr.Flags |= ib.SendSignaled
	if n, err := r.a.PostSend([]ib.SendWR{wr}); n != 1 {
		r.t.Fatal(err)
	}
	r.wait(1)
}

// write is an RDMA WRITE of all of from to the beginning of to.
func write(from ib.SGE, to mr.RemoteKey) ib.SendWR {
	return ib.SendWR{Opcode: ib.OpRDMAWrite, SGEs: []ib.SGE{from}, RemoteAddr: to.Addr, RKey: to.RKey}
}

var background = context.Background()
