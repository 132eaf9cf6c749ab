package qp

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/ringside-rdma/ringside/internal/driver/drivertest"
	"github.com/ringside-rdma/ringside/internal/testutil"
	"github.com/ringside-rdma/ringside/verbs"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

var (
	allStates = []ib.QPState{ib.Reset, ib.Init, ib.RTR, ib.RTS, ib.SQD, ib.SQE, ib.Err}
	allTypes  = []ib.QPType{ib.RC, ib.UC, ib.UD, ib.RawPacket}
	allAttrs  = []ib.QPAttrMask{ib.AttrCurState, ib.AttrSQDNotify, ib.AttrAccess, ib.AttrPKeyIndex, ib.AttrPort, ib.AttrQKey, ib.AttrAV,
		ib.AttrPathMTU, ib.AttrAckTimeout, ib.AttrRetryCount, ib.AttrRNRRetry, ib.AttrRQPSN, ib.AttrMaxRdAtomic, ib.AttrMinRNRTimer,
		ib.AttrSQPSN, ib.AttrMaxDestRdAtomic, ib.AttrDestQPN}
)

// golden is the state table a second time, written as the specification's table 91 reads: row by row, letters for
// attributes. A slip of the pen in one of the two is found.
//
//	c CurState  n SQDNotify  a Access  k PKeyIndex  p Port  q QKey  v AH  m PathMTU  t AckTimeout  r RetryCount
//	R RNRRetry  P RQPSN  i MaxRdAtomic  w MinRNRTimer  S SQPSN  d MaxDestRdAtomic  D DestQPN
//
// "need/may" for RC, UC, UD, and what Linux' mlx5 takes for RawPacket; "-" is no transition.
var golden = map[transition][4]string{
	{ib.Reset, ib.Reset}: {"/", "/", "/", "/"},
	{ib.Reset, ib.Init}:  {"kpa/", "kpa/", "kpq/", "p/"},
	{ib.Init, ib.Init}:   {"/kpa", "/kpa", "/kpq", "-"},
	{ib.Init, ib.RTR}:    {"vmDPdw/ak", "vmDP/ak", "/kq", "/"},
	{ib.RTR, ib.RTS}:     {"trRSi/caw", "S/ca", "S/cq", "/"},
	{ib.RTS, ib.RTS}:     {"/caw", "/ca", "/cq", "-"},
	{ib.RTS, ib.SQD}:     {"/n", "/n", "/n", "-"},
	{ib.SQD, ib.RTS}:     {"/caw", "/ca", "/cq", "-"},
	{ib.SQD, ib.SQD}:     {"/pvtrRidakw", "/vak", "/kq", "-"},
	{ib.SQE, ib.RTS}:     {"-", "/ca", "/cq", "-"},

	{ib.Init, ib.Reset}: {"/", "/", "/", "/"}, {ib.RTR, ib.Reset}: {"/", "/", "/", "/"}, {ib.RTS, ib.Reset}: {"/", "/", "/", "/"},
	{ib.SQD, ib.Reset}: {"/", "/", "/", "-"}, {ib.SQE, ib.Reset}: {"-", "/", "/", "-"}, {ib.Err, ib.Reset}: {"/", "/", "/", "/"},
	{ib.Init, ib.Err}: {"/", "/", "/", "/"}, {ib.RTR, ib.Err}: {"/", "/", "/", "/"}, {ib.RTS, ib.Err}: {"/", "/", "/", "/"},
	{ib.SQD, ib.Err}: {"/", "/", "/", "-"}, {ib.SQE, ib.Err}: {"-", "/", "/", "-"}, {ib.Err, ib.Err}: {"/", "/", "/", "/"},
}

var letters = map[rune]ib.QPAttrMask{'c': ib.AttrCurState, 'n': ib.AttrSQDNotify, 'a': ib.AttrAccess, 'k': ib.AttrPKeyIndex,
	'p': ib.AttrPort, 'q': ib.AttrQKey, 'v': ib.AttrAV, 'm': ib.AttrPathMTU, 't': ib.AttrAckTimeout, 'r': ib.AttrRetryCount,
	'R': ib.AttrRNRRetry, 'P': ib.AttrRQPSN, 'i': ib.AttrMaxRdAtomic, 'w': ib.AttrMinRNRTimer, 'S': ib.AttrSQPSN,
	'd': ib.AttrMaxDestRdAtomic, 'D': ib.AttrDestQPN}

func parse(s string) (need, may ib.QPAttrMask, ok bool) {
	if s == "" || s == "-" {
		return 0, 0, false
	}
	m := &need
	for _, c := range s {
		if c == '/' {
			m = &may
			continue
		}
		*m |= letters[c]
	}
	return need, may, true
}

func TestTransitionTable(t *testing.T) {
	for i, typ := range allTypes {
		for _, from := range allStates {
			for _, to := range allStates {
				need, may, ok := Transition(typ, from, to)
				wantNeed, wantMay, wantOK := parse(golden[transition{from, to}][i])
				if need != wantNeed || may != wantMay || ok != wantOK {
					t.Errorf("%s %s -> %s: need %s, may %s, %t; want %s, %s, %t", typ, from, to, need, may, ok, wantNeed, wantMay, wantOK)
				}
				if need&may != 0 || (need|may)&ib.AttrState != 0 {
					t.Errorf("%s %s -> %s: inconsistent", typ, from, to)
				}
			}
		}
	}
	if _, _, ok := Transition(9, ib.Reset, ib.Init); ok {
		t.Error("an unknown type has transitions")
	}
}

// Every pair of states of every type, with every attribute that is needed left out and every other one added, through
// Modify: what is refused does not reach the device, what is right does.
func TestModifyEveryTransition(t *testing.T) {
	r := newRig(t)
	for _, typ := range allTypes {
		q, dev := r.qp(t, typ)
		for _, from := range allStates {
			for _, to := range allStates {
				try := func(mask ib.QPAttrMask) (*StateError, bool) {
					dev.SetState(from)
					before := len(dev.Mods)
					err := q.Modify(t.Context(), &ib.QPAttr{State: to, CurState: from}, mask)
					var se *StateError
					if err != nil && (!errors.As(err, &se) || !errors.Is(err, verbs.ErrState)) {
						t.Fatalf("%s %s -> %s: %v", typ, from, to, err)
					}
					reached := len(dev.Mods) > before
					if reached != (err == nil) {
						t.Errorf("%s %s -> %s with %s: reached the device: %t, error %v", typ, from, to, mask, reached, err)
					}
					if want := from; err != nil && q.State() != want {
						t.Errorf("refused, but the state is now %s", q.State())
					}
					return se, err == nil
				}
				need, may, ok := Transition(typ, from, to)
				if !ok {
					if se, passed := try(ib.AttrState); passed || se.Reason != "there is no such transition" || se.From != from || se.To != to {
						t.Errorf("%s %s -> %s: %v", typ, from, to, se)
					}
					continue
				}
				if se, passed := try(ib.AttrState | need); !passed {
					t.Errorf("%s %s -> %s with what it needs: %v", typ, from, to, se)
				}
				if se, passed := try(ib.AttrState | need | may); !passed {
					t.Errorf("%s %s -> %s with all that it takes: %v", typ, from, to, se)
				}
				for _, a := range allAttrs {
					switch {
					case need&a != 0:
						if se, passed := try(ib.AttrState | need&^a); passed || se.Missing != a || se.NotAllowed != 0 {
							t.Errorf("%s %s -> %s without %s: %v", typ, from, to, a, se)
						}
					case may&a == 0 && a != ib.AttrCurState:
						if se, passed := try(ib.AttrState | need | a); passed || se.NotAllowed != a || se.Missing != 0 {
							t.Errorf("%s %s -> %s with %s: %v", typ, from, to, a, se)
						}
					}
				}
			}
		}
	}
}

func TestModifyWithoutStateStays(t *testing.T) {
	r := newRig(t)
	q, dev := r.qp(t, ib.RC)
	dev.SetState(ib.RTS)
	// attr.State is not looked at without AttrState.
	if err := q.Modify(t.Context(), &ib.QPAttr{State: ib.Reset, MinRNRTimer: 5}, ib.AttrMinRNRTimer); err != nil || q.State() != ib.RTS {
		t.Error(err, q.State())
	}
	err := q.Modify(t.Context(), &ib.QPAttr{}, ib.AttrPathMTU)
	var se *StateError
	if !errors.As(err, &se) || se.From != ib.RTS || se.To != ib.RTS || se.NotAllowed != ib.AttrPathMTU {
		t.Error(err)
	}
}

// A Modify that waits for another one ends with its context.
func TestModifyWaitsWithContext(t *testing.T) {
	reached, release := make(chan struct{}, 2), make(chan struct{})
	r := newRig(t, func(d *drivertest.Device) { d.Modifying = func() { reached <- struct{}{}; <-release } })
	q, dq := r.qp(t, ib.RC)
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- q.Init(t.Context(), 1, 0) }()
	<-reached
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	go func() { second <- q.Reset(ctx) }()
	select {
	case err := <-second:
		var oe *verbs.OpError
		if !errors.Is(err, context.Canceled) || !errors.As(err, &oe) {
			t.Error(err)
		}
	case <-time.After(testutil.Patience):
		t.Error("a Modify waits for another one in spite of its context")
	}
	close(release)
	if err := <-first; err != nil || q.State() != ib.Init || len(dq.Mods) != 1 {
		t.Error(err, q.State(), dq.Mods)
	}
}

func TestModifyCurState(t *testing.T) {
	r := newRig(t)
	q, dev := r.qp(t, ib.UC)
	dev.SetState(ib.SQE)
	var se *StateError
	err := q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS, CurState: ib.RTR}, ib.AttrState|ib.AttrCurState)
	if !errors.As(err, &se) || se.Reason != "CurState says RTR, but the QP is in SQE" {
		t.Error(err)
	}
	err = q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS, CurState: ib.Init}, ib.AttrState|ib.AttrCurState)
	if !errors.As(err, &se) || se.Reason != "CurState cannot be INIT" {
		t.Error(err)
	}
	if err := q.Modify(t.Context(), &ib.QPAttr{State: ib.RTS, CurState: ib.SQE}, ib.AttrState|ib.AttrCurState); err != nil {
		t.Error(err)
	}
}

func TestModifyDeviceError(t *testing.T) {
	r := newRig(t)
	q, _ := r.qp(t, ib.RC)
	bad := errors.New("no such port")
	r.dev.Fail("modify_qp", bad)
	err := q.Init(t.Context(), 9, 0)
	var oe *verbs.OpError
	if !errors.Is(err, bad) || !errors.As(err, &oe) || oe.Op != "modify_qp" || errors.Is(err, verbs.ErrState) {
		t.Error(err)
	}
}

func ExampleStateError() {
	err := check(ib.RC, ib.Init, &ib.QPAttr{State: ib.RTR}, ib.AttrState|rtrRC&^ib.AttrPathMTU|ib.AttrQKey)
	fmt.Println(err)
	// Output: qp: RC INIT -> RTR: missing PathMTU; not allowed here: QKey
}
