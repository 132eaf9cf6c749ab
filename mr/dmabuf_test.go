package mr

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A region of another device's memory has keys and addresses, and no bytes.
func TestRegisterDMABuf(t *testing.T) {
	pd, dev := newPD(t)
	const access = ib.AccessLocalWrite | ib.AccessRemoteRead
	m, err := RegisterDMABuf(pd, 7, 0x3000, 1<<30, 0x7f0000001000, access)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := m.drv.(*drivertest.MR).DMABuf, (driver.DMABufConfig{FD: 7, Offset: 0x3000, Length: 1 << 30, IOVA: 0x7f0000001000, Access: access}); got != want {
		t.Errorf("%+v", got)
	}
	if m.Bytes() != nil || m.Len() != 1<<30 || m.Addr() != 0x7f0000001000 {
		t.Error(m.Bytes(), m.Len(), m.Addr())
	}
	if got, want := m.SGE(1<<29, 100), (ib.SGE{Addr: 0x7f0000001000 + 1<<29, Length: 100, LKey: m.LKey()}); got != want {
		t.Errorf("%+v", got)
	}
	if k := m.Remote(); k.Addr != m.Addr() || k.Len != 1<<30 || k.Access != ib.AccessRemoteRead {
		t.Errorf("%+v", k)
	}
	panics(t, func() { m.SGE(1<<30-99, 100) })
	if err := m.Close(); err != nil || m.Close() != nil {
		t.Error(err)
	}
	dev.Fail("reg_mr", errors.ErrUnsupported)
	if _, err := RegisterDMABuf(pd, 7, 0, 4096, 0, 0); !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
}

func TestRegisterDMABufRefused(t *testing.T) {
	pd, _ := newPD(t)
	for what, err := range map[string]error{
		"no descriptor":  second(RegisterDMABuf(pd, -1, 0, 4096, 0, 0)),
		"no bytes":       second(RegisterDMABuf(pd, 7, 0, 0, 0, 0)),
		"before it":      second(RegisterDMABuf(pd, 7, -4096, 4096, 0, 0)),
		"beyond int64":   second(RegisterDMABuf(pd, 7, math.MaxInt64-4095, 4097, 0, 0)),
		"beyond uint64":  second(RegisterDMABuf(pd, 7, 0, 4096, math.MaxUint64-4094, 0)),
		"zero-based":     second(RegisterDMABuf(pd, 7, 0, 4096, 0, ib.AccessZeroBased)),
		"unknown rights": second(RegisterDMABuf(pd, 7, 0, 4096, 0, 1<<31)),
	} {
		var oe *verbs.OpError
		if !errors.As(err, &oe) || oe.Op != "reg_mr" || errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
	soft, err := verbs.Open("soft0")
	if err != nil {
		t.Fatal(err)
	}
	softPD := must(soft.AllocPD())
	if _, err := RegisterDMABuf(softPD, 7, 0, 4096, 0, 0); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "dma-buf") {
		t.Error(err)
	}
	if err := errors.Join(softPD.Close(), soft.Close()); err != nil {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }
