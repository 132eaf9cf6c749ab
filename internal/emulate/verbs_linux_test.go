package emulate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/mem"
	"github.com/ringside-rdma/ringside/internal/provider/mlx5"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A side is a queue pair of a device, with memory.
type side struct {
	ctx driver.Context
	pd  driver.PD
	cq  driver.CQ
	q   driver.QP
	mr  driver.MR
	reg *mem.Region
	gid ib.GID
}

func newSide(d driver.Device) (*side, error) {
	s := &side{}
	var err error
	try := func(f func() error) {
		if err == nil {
			err = f()
		}
	}
	try(func() (err error) { s.ctx, err = d.Open(); return })
	try(func() (err error) { s.pd, err = s.ctx.AllocPD(); return })
	try(func() (err error) { s.cq, err = s.ctx.CreateCQ(driver.CQConfig{Entries: 32}); return })
	try(func() (err error) { s.reg, err = mem.Alloc(1<<16, mem.Options{}); return })
	try(func() (err error) {
		s.mr, err = s.pd.RegisterMR(driver.MRConfig{Mem: s.reg.Bytes(), FD: -1, Access: ib.AccessLocalWrite | ib.AccessRemote})
		return
	})
	try(func() (err error) {
		s.q, err = s.pd.CreateQP(driver.QPConfig{Type: ib.RC, SendCQ: s.cq, RecvCQ: s.cq,
			Cap: ib.QPCap{MaxSendWR: 8, MaxRecvWR: 8, MaxSendSGE: 1, MaxRecvSGE: 1}})
		return
	})
	try(func() error {
		l, err := s.ctx.GIDs(1)
		if err == nil {
			s.gid = l[0].GID
		}
		return err
	})
	return s, err
}

func (s *side) connect(to *side) error {
	ctx := context.Background()
	for _, m := range []struct {
		a    ib.QPAttr
		mask ib.QPAttrMask
	}{
		{ib.QPAttr{State: ib.Init, Port: 1, Access: ib.AccessRemote}, ib.AttrState | ib.AttrPort | ib.AttrPKeyIndex | ib.AttrAccess},
		{ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{DGID: to.gid, Port: 1, HopLimit: 1}, PathMTU: ib.MTU1024, DestQPN: to.q.QPN(), MaxDestRdAtomic: 4, MinRNRTimer: 1},
			ib.AttrState | ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN | ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer},
		{ib.QPAttr{State: ib.RTS, MaxRdAtomic: 4, AckTimeout: 18, RetryCount: 7, RNRRetry: 7},
			ib.AttrState | ib.AttrMaxRdAtomic | ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrSQPSN},
	} {
		if err := s.q.Modify(ctx, &m.a, m.mask); err != nil {
			return fmt.Errorf("to %v: %w", m.a.State, err)
		}
	}
	return nil
}

func (s *side) sge(off, n int) []ib.SGE {
	return []ib.SGE{{Addr: s.addr(off), Length: uint32(n), LKey: s.mr.LKey()}}
}

func (s *side) want(id uint64) error { return s.wantStatus(id, ib.WCSuccess) }

func (s *side) wantStatus(id uint64, st ib.WCStatus) error {
	var wc [1]ib.WC
	for s.cq.Poll(wc[:]) == 0 {
		time.Sleep(20 * time.Microsecond) // two who spin leave the devices no processor
	}
	if wc[0].ID != id || wc[0].Status != st {
		return fmt.Errorf("completion %+v, want %d with %v", wc[0], id, st)
	}
	return nil
}

// verbs has two devices talk to each other, by this repository's driver.
func verbs([]string) error {
	devices, err := mlx5.Provider().Devices()
	if err != nil || len(devices) != 2 {
		return fmt.Errorf("devices %v, %w", devices, err)
	}
	a, err := newSide(devices[0])
	if err != nil {
		return err
	}
	b, err := newSide(devices[1])
	if err != nil {
		return err
	}
	if err := errors.Join(a.connect(b), b.connect(a)); err != nil {
		return err
	}
	am, bm := a.reg.Bytes(), b.reg.Bytes()
	for i := range 20 {
		copy(am, fmt.Sprintf("message %d", i))
		if _, err := b.q.PostRecv([]ib.RecvWR{{ID: 1, SGEs: b.sge(64, 64)}}); err != nil {
			return err
		}
		_, err := a.q.PostSend([]ib.SendWR{
			{ID: 2, Opcode: ib.OpSend, SGEs: a.sge(0, 64), Flags: ib.SendSignaled},
			{ID: 3, Opcode: ib.OpRDMAWrite, SGEs: a.sge(0, 5000), RemoteAddr: b.addr(8192), RKey: b.mr.RKey(), Flags: ib.SendSignaled},
			{ID: 4, Opcode: ib.OpRDMARead, SGEs: a.sge(8192, 64), RemoteAddr: b.addr(64), RKey: b.mr.RKey(), Flags: ib.SendSignaled},
			{ID: 5, Opcode: ib.OpAtomicFetchAdd, CompareAdd: 3, SGEs: a.sge(16, 8), RemoteAddr: b.addr(0), RKey: b.mr.RKey(), Flags: ib.SendSignaled},
		})
		if err != nil {
			return err
		}
		if err := errors.Join(b.want(1), a.want(2), a.want(3), a.want(4), a.want(5)); err != nil {
			return err
		}
		want := fmt.Sprintf("message %d", i)
		if string(bm[64:64+len(want)]) != want || string(bm[8192:8192+len(want)]) != want || string(am[8192:8192+len(want)]) != want {
			return fmt.Errorf("after %q: %q sent, %q written, %q read", want, bm[64:80], bm[8192:8208], am[8192:8208])
		}
		if bm[0] != byte(3*(i+1)) || am[16] != byte(3*i) {
			return fmt.Errorf("an addition to %d left %d, and returned %d", 3*i, bm[0], am[16])
		}
	}
	for _, s := range []*side{a, b} {
		for _, c := range []interface{ Close() error }{s.q, s.mr, s.cq, s.pd, s.ctx} {
			if err := c.Close(); err != nil {
				return fmt.Errorf("close %T: %w", c, err)
			}
		}
	}
	return nil
}

// An opened is a device that was opened already.
type opened struct {
	driver.Device
	ctx driver.Context
}

func (o opened) Open() (driver.Context, error) { return o.ctx, nil }

// openerEnds has a thread open the device and end, before others use it.
func openerEnds([]string) error {
	devices, err := mlx5.Provider().Devices()
	if err != nil {
		return err
	}
	var ctx driver.Context
	tid := make(chan int)
	go func() {
		runtime.LockOSThread() // it ends with this
		ctx, err = devices[0].Open()
		tid <- unix.Gettid()
	}()
	task := fmt.Sprintf("/proc/self/task/%d", <-tid)
	if err != nil {
		return err
	}
	for range 1000 {
		if _, err := os.Stat(task); err != nil {
			s, err := newSide(opened{devices[0], ctx})
			if err != nil {
				return err
			}
			return s.connect(s)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("the thread has not ended")
}
