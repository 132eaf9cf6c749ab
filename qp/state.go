package qp

import (
	"fmt"
	"strings"

	"github.com/ringside-rdma/ringside/internal/driver"
	"github.com/ringside-rdma/ringside/verbs/ib"
)

// A StateError is a Modify that the state table does not allow (IBA 11.2.5.2, table 91). It is found before the device
// is asked, which would only say "invalid argument". It matches verbs.ErrState.
type StateError struct {
	Type     ib.QPType
	From, To ib.QPState
	// Missing are attributes that the transition needs and the mask lacks.
	Missing ib.QPAttrMask
	// NotAllowed are attributes in the mask that the transition does not take.
	NotAllowed ib.QPAttrMask
	// Reason is set if there is no such transition at all, or the caller is wrong about the current state.
	Reason string
}

func (e *StateError) Error() string {
	var why []string
	if e.Reason != "" {
		why = append(why, e.Reason)
	}
	if e.Missing != 0 {
		why = append(why, "missing "+e.Missing.String())
	}
	if e.NotAllowed != 0 {
		why = append(why, "not allowed here: "+e.NotAllowed.String())
	}
	return fmt.Sprintf("qp: %s %s -> %s: %s", e.Type, e.From, e.To, strings.Join(why, "; "))
}

func (e *StateError) Unwrap() error { return driver.ErrState }

// step is what one transition of one QP type takes.
type step struct{ need, may ib.QPAttrMask }

// transition is a pair of states.
type transition struct{ from, to ib.QPState }

const (
	initRC = ib.AttrPKeyIndex | ib.AttrPort | ib.AttrAccess
	initUD = ib.AttrPKeyIndex | ib.AttrPort | ib.AttrQKey
	rtrUC  = ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN
	rtrRC  = rtrUC | ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer
	rtsRC  = ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrSQPSN | ib.AttrMaxRdAtomic
)

// steps is IBA table 91, as the Linux kernel's qp_state_table has it (drivers/infiniband/core/verbs.c, v6.12), without
// alternate paths, which RoCE does not have. AttrState is left out: every row takes it.
//
//	        Reset --> Init --> RTR --> RTS <--> SQD
//	                  |  ^             |  ^      |  ^
//	                  +--+             +--+      +--+
//
//	SQE -> RTS (UC, UD; a device puts a QP into SQE)      any -> Reset      any but Reset -> Err
var steps = map[ib.QPType]map[transition]step{
	ib.RC: {
		{ib.Reset, ib.Reset}: {},
		{ib.Reset, ib.Init}:  {need: initRC},
		{ib.Init, ib.Init}:   {may: initRC},
		{ib.Init, ib.RTR}:    {need: rtrRC, may: ib.AttrAccess | ib.AttrPKeyIndex},
		{ib.RTR, ib.RTS}:     {need: rtsRC, may: ib.AttrCurState | ib.AttrAccess | ib.AttrMinRNRTimer},
		{ib.RTS, ib.RTS}:     {may: ib.AttrCurState | ib.AttrAccess | ib.AttrMinRNRTimer},
		{ib.RTS, ib.SQD}:     {may: ib.AttrSQDNotify},
		{ib.SQD, ib.RTS}:     {may: ib.AttrCurState | ib.AttrAccess | ib.AttrMinRNRTimer},
		{ib.SQD, ib.SQD}: {may: ib.AttrPort | ib.AttrAV | ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry |
			ib.AttrMaxRdAtomic | ib.AttrMaxDestRdAtomic | ib.AttrAccess | ib.AttrPKeyIndex | ib.AttrMinRNRTimer},
		{ib.Init, ib.Reset}: {}, {ib.RTR, ib.Reset}: {}, {ib.RTS, ib.Reset}: {}, {ib.SQD, ib.Reset}: {}, {ib.Err, ib.Reset}: {},
		{ib.Init, ib.Err}: {}, {ib.RTR, ib.Err}: {}, {ib.RTS, ib.Err}: {}, {ib.SQD, ib.Err}: {}, {ib.Err, ib.Err}: {},
	},
	ib.UC: {
		{ib.Reset, ib.Reset}: {},
		{ib.Reset, ib.Init}:  {need: initRC},
		{ib.Init, ib.Init}:   {may: initRC},
		{ib.Init, ib.RTR}:    {need: rtrUC, may: ib.AttrAccess | ib.AttrPKeyIndex},
		{ib.RTR, ib.RTS}:     {need: ib.AttrSQPSN, may: ib.AttrCurState | ib.AttrAccess},
		{ib.RTS, ib.RTS}:     {may: ib.AttrCurState | ib.AttrAccess},
		{ib.RTS, ib.SQD}:     {may: ib.AttrSQDNotify},
		{ib.SQD, ib.RTS}:     {may: ib.AttrCurState | ib.AttrAccess},
		{ib.SQD, ib.SQD}:     {may: ib.AttrAV | ib.AttrAccess | ib.AttrPKeyIndex},
		{ib.SQE, ib.RTS}:     {may: ib.AttrCurState | ib.AttrAccess},
		{ib.Init, ib.Reset}:  {}, {ib.RTR, ib.Reset}: {}, {ib.RTS, ib.Reset}: {}, {ib.SQD, ib.Reset}: {}, {ib.SQE, ib.Reset}: {}, {ib.Err, ib.Reset}: {},
		{ib.Init, ib.Err}: {}, {ib.RTR, ib.Err}: {}, {ib.RTS, ib.Err}: {}, {ib.SQD, ib.Err}: {}, {ib.SQE, ib.Err}: {}, {ib.Err, ib.Err}: {},
	},
	ib.UD: {
		{ib.Reset, ib.Reset}: {},
		{ib.Reset, ib.Init}:  {need: initUD},
		{ib.Init, ib.Init}:   {may: initUD},
		{ib.Init, ib.RTR}:    {may: ib.AttrPKeyIndex | ib.AttrQKey},
		{ib.RTR, ib.RTS}:     {need: ib.AttrSQPSN, may: ib.AttrCurState | ib.AttrQKey},
		{ib.RTS, ib.RTS}:     {may: ib.AttrCurState | ib.AttrQKey},
		{ib.RTS, ib.SQD}:     {may: ib.AttrSQDNotify},
		{ib.SQD, ib.RTS}:     {may: ib.AttrCurState | ib.AttrQKey},
		{ib.SQD, ib.SQD}:     {may: ib.AttrPKeyIndex | ib.AttrQKey},
		{ib.SQE, ib.RTS}:     {may: ib.AttrCurState | ib.AttrQKey},
		{ib.Init, ib.Reset}:  {}, {ib.RTR, ib.Reset}: {}, {ib.RTS, ib.Reset}: {}, {ib.SQD, ib.Reset}: {}, {ib.SQE, ib.Reset}: {}, {ib.Err, ib.Reset}: {},
		{ib.Init, ib.Err}: {}, {ib.RTR, ib.Err}: {}, {ib.RTS, ib.Err}: {}, {ib.SQD, ib.Err}: {}, {ib.SQE, ib.Err}: {}, {ib.Err, ib.Err}: {},
	},
	// None of the specification's: as Linux' mlx5 driver takes it, which has no SQD and no SQE for it.
	ib.RawPacket: {
		{ib.Reset, ib.Reset}: {},
		{ib.Reset, ib.Init}:  {need: ib.AttrPort},
		{ib.Init, ib.RTR}:    {},
		{ib.RTR, ib.RTS}:     {},
		{ib.Init, ib.Reset}:  {}, {ib.RTR, ib.Reset}: {}, {ib.RTS, ib.Reset}: {}, {ib.Err, ib.Reset}: {},
		{ib.Init, ib.Err}: {}, {ib.RTR, ib.Err}: {}, {ib.RTS, ib.Err}: {}, {ib.Err, ib.Err}: {},
	},
}

// Transition returns the attributes that a Modify of a QP of type t from one state to another needs, and those it may
// set besides, without AttrState itself; ok is false if there is no such transition.
func Transition(t ib.QPType, from, to ib.QPState) (need, may ib.QPAttrMask, ok bool) {
	s, ok := steps[t][transition{from, to}]
	return s.need, s.may, ok
}

// check returns why a QP of type t in state now cannot be modified so, or nil.
func check(t ib.QPType, now ib.QPState, attr *ib.QPAttr, mask ib.QPAttrMask) error {
	to := now
	if mask&ib.AttrState != 0 {
		to = attr.State
	}
	e := &StateError{Type: t, From: now, To: to}
	if mask&ib.AttrCurState != 0 {
		// The caller may say what it believes only where a device can change the state by itself (IBA 11.2.5.2).
		switch attr.CurState {
		case ib.RTR, ib.RTS, ib.SQD, ib.SQE:
		default:
			e.Reason = fmt.Sprintf("CurState cannot be %s", attr.CurState)
			return e
		}
		if attr.CurState != now {
			e.Reason = fmt.Sprintf("CurState says %s, but the QP is in %s", attr.CurState, now)
			return e
		}
	}
	s, ok := steps[t][transition{now, to}]
	if !ok {
		e.Reason = "there is no such transition"
		return e
	}
	e.Missing = s.need &^ mask
	e.NotAllowed = mask &^ (s.need | s.may | ib.AttrState)
	if e.Missing != 0 || e.NotAllowed != 0 {
		return e
	}
	return nil
}
