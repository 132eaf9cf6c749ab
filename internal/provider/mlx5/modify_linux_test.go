//go:build amd64 || arm64

package mlx5

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

const modifyQP = 26

// A P_Key index without a port is of the port that the queue pair has.
func TestModifyPKeyIndex(t *testing.T) {
	b := bare(t)
	o, err := b.pd.CreateQP(b.config(ib.UD))
	if err != nil {
		t.Fatal(err)
	}
	q := o.(*qp)
	defer b.close(q)
	if err := q.Modify(t.Context(), &ib.QPAttr{State: ib.Init, Port: 1}, ib.AttrState|ib.AttrPort|ib.AttrPKeyIndex|ib.AttrQKey); err != nil {
		t.Fatal(err)
	}
	err = q.Modify(t.Context(), &ib.QPAttr{State: ib.RTR, PKeyIndex: 128}, ib.AttrState|ib.AttrPKeyIndex)
	if err == nil || !strings.Contains(err.Error(), "P_Key index 128: port 1 has 128 P_Keys") {
		t.Error(err)
	}
	if err := q.Modify(t.Context(), &ib.QPAttr{State: ib.RTR, PKeyIndex: 127}, ib.AttrState|ib.AttrPKeyIndex); err != nil {
		t.Error(err)
	}
}

// endsLater is a context that has ended, which shows at the second look only.
type endsLater struct {
	context.Context
	looked atomic.Bool
}

func (c *endsLater) Err() error {
	if !c.looked.Swap(true) {
		return nil
	}
	return c.Context.Err()
}

// A change that waits for another one, which its caller has left to the kernel, ends with its context, and is not made then.
func TestModifyWaitsWithContext(t *testing.T) {
	b := newBench(t, ib.RC)
	ctx, cancel := context.WithCancel(t.Context())
	connect := func(ctx context.Context) error {
		return b.qp.Modify(ctx, &ib.QPAttr{State: ib.RTR, AH: ib.AHAttr{Port: 1}}, ib.AttrState|ib.AttrAV)
	}
	first := make(chan struct{})
	b.k.During[modifyQP] = func() { cancel(); <-first }
	if err := connect(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	others := make(chan error, 2)
	go func() {
		others <- b.qp.Modify(&endsLater{Context: ctx}, &ib.QPAttr{State: ib.Reset}, ib.AttrState)
		others <- connect(&endsLater{Context: ctx})
	}()
	for range 2 {
		select {
		case err := <-others:
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		case <-time.After(testutil.Patience):
			close(first)
			t.Fatal("a change waits for another one in spite of its context")
		}
	}
	b.k.Mu.Lock()
	b.k.During[modifyQP], b.k.Errs[modifyQP] = nil, unix.EIO
	before := len(b.k.Commands)
	b.k.Mu.Unlock()
	close(first)
	if err := b.qp.Modify(t.Context(), &ib.QPAttr{State: ib.Reset}, ib.AttrState); !errors.Is(err, unix.EIO) { // after those before
		t.Error(err)
	}
	b.k.Mu.Lock()
	defer b.k.Mu.Unlock()
	delete(b.k.Errs, modifyQP)
	if c := b.k.Commands[before:]; !slices.Equal(c, []uint32{modifyQP}) {
		t.Errorf("commands %d", c)
	}
}
