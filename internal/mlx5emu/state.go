package mlx5emu

import "github.com/ringside-rdma/ringside/verbs/ib"

// The changes of a queue pair's state, as the kernel's core lets them pass (drivers/infiniband/core/verbs.c, qp_state_table)
// before a driver sees them. The public package has a table of the same source for its own errors; this one is the kernel's
// side, which must not believe it.

// A change is what one transition needs, and may set besides.
type change struct{ need, may ib.QPAttrMask }

const (
	attrAltPath  ib.QPAttrMask = 1 << 14
	attrMigState ib.QPAttrMask = 1 << 18

	initConnected = ib.AttrPKeyIndex | ib.AttrPort | ib.AttrAccess
	initDatagram  = ib.AttrPKeyIndex | ib.AttrPort | ib.AttrQKey
	pathAttrs     = ib.AttrAV | ib.AttrPathMTU | ib.AttrDestQPN | ib.AttrRQPSN
	moreUC        = ib.AttrCurState | attrAltPath | ib.AttrAccess | attrMigState
	moreRC        = moreUC | ib.AttrMinRNRTimer
	moreUD        = ib.AttrCurState | ib.AttrQKey
)

// changes are the transitions that take attributes, by type of queue pair; besides, any state but RESET goes to ERR, and any to
// RESET, without.
var changes = map[ib.QPType]map[[2]ib.QPState]change{
	ib.RC: {
		{ib.Reset, ib.Init}: {need: initConnected},
		{ib.Init, ib.Init}:  {may: initConnected},
		{ib.Init, ib.RTR}: {need: pathAttrs | ib.AttrMaxDestRdAtomic | ib.AttrMinRNRTimer,
			may: attrAltPath | ib.AttrAccess | ib.AttrPKeyIndex},
		{ib.RTR, ib.RTS}: {need: ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrSQPSN | ib.AttrMaxRdAtomic, may: moreRC},
		{ib.RTS, ib.RTS}: {may: moreRC},
		{ib.RTS, ib.SQD}: {may: ib.AttrSQDNotify},
		{ib.SQD, ib.RTS}: {may: moreRC},
		{ib.SQD, ib.SQD}: {may: ib.AttrPort | ib.AttrAV | ib.AttrAckTimeout | ib.AttrRetryCount | ib.AttrRNRRetry | ib.AttrMaxRdAtomic |
			ib.AttrMaxDestRdAtomic | attrAltPath | ib.AttrAccess | ib.AttrPKeyIndex | ib.AttrMinRNRTimer | attrMigState},
		{ib.SQE, ib.RTS}: {},
	},
	ib.UC: {
		{ib.Reset, ib.Init}: {need: initConnected},
		{ib.Init, ib.Init}:  {may: initConnected},
		{ib.Init, ib.RTR}:   {need: pathAttrs, may: attrAltPath | ib.AttrAccess | ib.AttrPKeyIndex},
		{ib.RTR, ib.RTS}:    {need: ib.AttrSQPSN, may: moreUC},
		{ib.RTS, ib.RTS}:    {may: moreUC},
		{ib.RTS, ib.SQD}:    {may: ib.AttrSQDNotify},
		{ib.SQD, ib.RTS}:    {may: moreUC},
		{ib.SQD, ib.SQD}:    {may: ib.AttrAV | attrAltPath | ib.AttrAccess | ib.AttrPKeyIndex | attrMigState},
		{ib.SQE, ib.RTS}:    {may: ib.AttrCurState | ib.AttrAccess},
	},
	ib.UD: {
		{ib.Reset, ib.Init}: {need: initDatagram},
		{ib.Init, ib.Init}:  {may: initDatagram},
		{ib.Init, ib.RTR}:   {may: ib.AttrPKeyIndex | ib.AttrQKey},
		{ib.RTR, ib.RTS}:    {need: ib.AttrSQPSN, may: moreUD},
		{ib.RTS, ib.RTS}:    {may: moreUD},
		{ib.RTS, ib.SQD}:    {may: ib.AttrSQDNotify},
		{ib.SQD, ib.RTS}:    {may: moreUD},
		{ib.SQD, ib.SQD}:    {may: ib.AttrPKeyIndex | ib.AttrQKey},
		{ib.SQE, ib.RTS}:    {may: moreUD},
	},
	ib.RawPacket: { // and no SQD, which the driver refuses
		{ib.Reset, ib.Init}: {need: ib.AttrPort},
		{ib.Init, ib.RTR}:   {},
		{ib.RTR, ib.RTS}:    {},
	},
}

// mayChange reports whether a queue pair of that type may go from one state to another with these attributes.
func mayChange(t ib.QPType, from, to ib.QPState, mask ib.QPAttrMask) bool {
	if mask&ib.AttrCurState != 0 && from != ib.RTR && from != ib.RTS && from != ib.SQD && from != ib.SQE {
		return false
	}
	c, ok := changes[t][[2]ib.QPState{from, to}]
	if !ok && to != ib.Reset && (to != ib.Err || from == ib.Reset) {
		return false
	}
	return mask&c.need == c.need && mask&^(c.need|c.may|ib.AttrState) == 0
}
