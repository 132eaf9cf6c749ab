package rxe

import (
	"context"
	"errors"
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// The caller's attributes are the caller's again when Modify returns, also if that is before the kernel has answered.
func TestModifyKeepsNoAttributes(t *testing.T) {
	b := newBench(t, ib.UD)
	ctx, cancel := context.WithCancel(t.Context())
	returned := make(chan struct{})
	b.k.During[26] = func() { cancel(); <-returned }
	attr := &ib.QPAttr{State: ib.Init, QKey: 7, AH: ib.AHAttr{Port: 1}}
	if err := b.qp.Modify(ctx, attr, ib.AttrState|ib.AttrQKey|ib.AttrAV); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	*attr = ib.QPAttr{State: ib.Reset, QKey: 8}
	close(returned)
	testutil.Eventually(t, "the kernel's answer", func() bool { return b.qp.qkey.Load() != 0x1234 })
	if k := b.qp.qkey.Load(); k != 7 {
		t.Errorf("the Q_Key is %d", k)
	}
}
