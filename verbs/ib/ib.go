// Package ib holds the words of the InfiniBand specification as Go types.
//
// It imports only the standard library, so that providers and the public packages above them can share
// the vocabulary. Values are the ones of the specification and of the kernel's uapi headers wherever
// those define any; sections are those of the InfiniBand Architecture Specification, volume 1 ("IBA").
// Every multi-byte field is in host byte order; providers convert at the edge of the wire.
package ib

import (
	"fmt"
	"math"
	"time"
)

// QPN is a queue pair number, 24 bits (IBA 3.5.10). QPN 0 and 1 are the management QPs.
type QPN uint32

// MaxQPN is the largest queue pair number.
const MaxQPN QPN = 1<<24 - 1

// LKey names a memory region for local access: the device checks it on every scatter/gather element.
// It never leaves the host.
type LKey uint32

// RKey names a memory region or window for access by a peer (IBA 10.6.3).
type RKey uint32

// QKey authorises datagrams: a UD receiver drops packets whose Q_Key is not its own (IBA 10.2.5).
type QKey uint32

// PKey is a partition key (IBA 10.9); the top bit means full membership.
type PKey uint16

// DefaultPKey is the partition that every port is a full member of.
const DefaultPKey PKey = 0xffff

// LID is a local identifier on an InfiniBand subnet; 0 on Ethernet.
type LID uint16

// PSN is a packet sequence number, a 24-bit counter (IBA 9.7).
type PSN uint32

// MaxPSN is the largest packet sequence number.
const MaxPSN PSN = 1<<24 - 1

// Add returns p advanced by n packets, modulo 2^24; n may be negative.
func (p PSN) Add(n int32) PSN { return (p + PSN(n)) & MaxPSN }

// Before reports whether p comes before q, which must be within half of the PSN space.
func (p PSN) Before(q PSN) bool { return int32((p-q)<<8) < 0 }

// QPType is a transport service (IBA 9.6). Values are enum ib_uverbs_qp_type's.
type QPType uint8

const (
	RC QPType = 2 // reliable connection
	UC QPType = 3 // unreliable connection
	UD QPType = 4 // unreliable datagram
	// RawPacket is none of the specification's: Ethernet frames as they are, which FlowRules bring to queue pairs. See qp.QP.Steer.
	RawPacket QPType = 8
)

func (t QPType) String() string {
	switch t {
	case RC:
		return "RC"
	case UC:
		return "UC"
	case UD:
		return "UD"
	case RawPacket:
		return "RawPacket"
	}
	return fmt.Sprintf("QPType(%d)", uint8(t))
}

// QPState is a queue pair's state (IBA 10.3.1). Values are enum ib_qp_state's.
//
//	Reset -> Init -> RTR -> RTS <-> SQD     any -> Reset, any -> Err     RTS -> SQE (UC, UD) -> RTS
type QPState uint8

const (
	Reset QPState = iota // nothing may be posted
	Init                 // receives may be posted; nothing is received
	RTR                  // ready to receive
	RTS                  // ready to send
	SQD                  // send queue drained or draining: sends are queued, not processed
	SQE                  // send queue error (UC and UD): sends flush, receives go on
	Err                  // everything flushes
)

func (s QPState) String() string {
	switch s {
	case Reset:
		return "RESET"
	case Init:
		return "INIT"
	case RTR:
		return "RTR"
	case RTS:
		return "RTS"
	case SQD:
		return "SQD"
	case SQE:
		return "SQE"
	case Err:
		return "ERR"
	}
	return fmt.Sprintf("QPState(%d)", uint8(s))
}

// Access is a set of rights on a memory region, window or QP. Values are enum ib_access_flags'.
type Access uint32

const (
	AccessLocalWrite  Access = 1 << 0 // the local device may write: receives, RDMA READ results, atomics' results
	AccessRemoteWrite Access = 1 << 1 // peers may RDMA WRITE; needs AccessLocalWrite
	AccessRemoteRead  Access = 1 << 2 // peers may RDMA READ
	// AccessRemoteAtomic lets peers do compare-and-swap and fetch-and-add; needs AccessLocalWrite.
	AccessRemoteAtomic Access = 1 << 3
	AccessMWBind       Access = 1 << 4 // memory windows may be bound to the region
	AccessZeroBased    Access = 1 << 5 // remote addresses count from 0 instead of from the region's address
	AccessOnDemand     Access = 1 << 6 // on-demand paging: pages are not pinned
	AccessHugeTLB      Access = 1 << 7 // the memory is backed by huge pages
	// AccessFlushGlobal and AccessFlushPersistent let peers FLUSH with that placement (IBA A19). The latter needs memory that
	// keeps its content without power.
	AccessFlushGlobal     Access = 1 << 8
	AccessFlushPersistent Access = 1 << 9
	// AccessRelaxedOrdering lets the device reorder its writes to the region (PCIe relaxed ordering).
	// Optional: devices without it ignore it.
	AccessRelaxedOrdering Access = 1 << 20
)

// AccessRemote is every right that a peer can be given.
const AccessRemote = AccessRemoteWrite | AccessRemoteRead | AccessRemoteAtomic

const accessKnown = AccessLocalWrite | AccessRemote | AccessMWBind | AccessZeroBased | AccessOnDemand | AccessHugeTLB |
	AccessFlushGlobal | AccessFlushPersistent | AccessRelaxedOrdering

// Check returns why a region cannot have the rights a, or nil: remote write and remote atomic need local write
// (IBA 10.6.3.1), and unknown bits are refused.
func (a Access) Check() error {
	if u := a &^ accessKnown; u != 0 {
		return fmt.Errorf("ib: unknown access bits %#x", uint32(u))
	}
	if a&(AccessRemoteWrite|AccessRemoteAtomic) != 0 && a&AccessLocalWrite == 0 {
		return fmt.Errorf("ib: access %v: remote write and remote atomic need local write: add AccessLocalWrite", a)
	}
	return nil
}

func (a Access) String() string {
	names := []struct {
		bit  Access
		name string
	}{
		{AccessLocalWrite, "local-write"}, {AccessRemoteWrite, "remote-write"}, {AccessRemoteRead, "remote-read"},
		{AccessRemoteAtomic, "remote-atomic"}, {AccessMWBind, "mw-bind"}, {AccessZeroBased, "zero-based"},
		{AccessOnDemand, "on-demand"}, {AccessHugeTLB, "huge-tlb"},
		{AccessFlushGlobal, "flush-global"}, {AccessFlushPersistent, "flush-persistent"}, {AccessRelaxedOrdering, "relaxed-ordering"},
	}
	s := ""
	for _, n := range names {
		if a&n.bit != 0 {
			s += "|" + n.name
			a &^= n.bit
		}
	}
	if a != 0 {
		s += fmt.Sprintf("|%#x", uint32(a))
	}
	if s == "" {
		return "local-read"
	}
	return s[1:]
}

// MTU is a path MTU as the specification encodes it: the largest payload of one packet.
type MTU uint8

const (
	MTU256 MTU = iota + 1
	MTU512
	MTU1024
	MTU2048
	MTU4096
)

// Bytes returns the MTU in bytes, or 0 if m is not a valid encoding.
func (m MTU) Bytes() int {
	if m < MTU256 || m > MTU4096 {
		return 0
	}
	return 128 << m
}

// MTUFor returns the largest MTU that is at most n bytes, or 0 if n is below 256.
func MTUFor(n int) MTU {
	for m := MTU4096; m >= MTU256; m-- {
		if m.Bytes() <= n {
			return m
		}
	}
	return 0
}

func (m MTU) String() string { return fmt.Sprintf("%d", m.Bytes()) }

// AckTimeout is the encoded local ACK timeout of a QP (IBA 9.7.6.1.3): 4.096 us << n, and 0 for "wait forever".
type AckTimeout uint8

// Duration returns the timeout, or 0 for "wait forever".
func (t AckTimeout) Duration() time.Duration {
	if t == 0 {
		return 0
	}
	return 4096 * time.Nanosecond << (t & 31)
}

// AckTimeoutFor returns the shortest wire timeout (4.096 us << n, n in [1, 31]) that is at least d; for
// d <= 0 it returns 0, which waits forever.
func AckTimeoutFor(d time.Duration) AckTimeout {
	if d <= 0 {
		return 0
	}
	for n := AckTimeout(1); n < 31; n++ {
		if n.Duration() >= d {
			return n
		}
	}
	return 31
}

// RNRTimer is the encoded minimum RNR NAK timer (IBA 9.7.5.2.8, table 45): how long a sender waits after it was
// told that no receive was posted.
type RNRTimer uint8

// rnrTimers is IBA table 45 in units of 10 us.
var rnrTimers = [32]uint32{65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192,
	256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152}

// Duration returns the timer's length, 10 us to 655.36 ms.
func (t RNRTimer) Duration() time.Duration {
	return time.Duration(rnrTimers[t&31]) * 10 * time.Microsecond
}

// RNRTimerFor returns the shortest encoded timer that is at least d.
func RNRTimerFor(d time.Duration) RNRTimer {
	for n := RNRTimer(1); n < 32; n++ {
		if n.Duration() >= d {
			return n
		}
	}
	return 0 // 655.36 ms, the longest
}

// RNRRetryForever is the RNR retry count that never gives up (IBA 9.7.5.2.8).
const RNRRetryForever = 7

// MaxRetry is the largest retry count and RNR retry count (3-bit fields).
const MaxRetry = 7

// GRHLen is the length of the Global Routing Header that a UD receive buffer starts with, in bytes (IBA 8.3).
const GRHLen = 40

// MaxMessage is the longest message that a QP carries: 2^31 bytes (IBA 9.7.2).
const MaxMessage = math.MaxInt32 + 1
