// Package driver is the contract between the public packages (verbs, mr, qp) and a provider.
//
// It follows database/sql/driver: few required methods, and optional ones that callers find by type assertion. What a
// provider lacks is reported above as errors.ErrUnsupported. A provider never imports verbs.
//
// Concurrency: every method of every object may be called from any goroutine at any time; providers hold their own
// locks, because only they know which lock also guards a mapping or a teardown that the kernel or a peer starts.
// After Close of an object its other methods return an error that matches net.ErrClosed. Close is called once an
// object (the layer above makes Close idempotent), waits for calls in progress, and is refused with ErrBusy while
// the object has children.
//
// Data path methods (PostSend, PostRecv, Poll) do not block, do not allocate, and touch their slice arguments only
// during the call.
package driver

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// Errors that providers return (wrapped or not) and verbs re-exports.
var (
	// ErrBusy: the object has children (a PD with regions, a CQ with queue pairs), and cannot be closed before them.
	ErrBusy = errors.New("object is in use: close what was made from it first")
	// ErrQueueFull: the send, receive or shared receive queue has no room for the work request.
	ErrQueueFull = errors.New("work queue is full: poll completions, or ask for a deeper queue")
	// ErrState: the QP's state does not allow the operation.
	ErrState = errors.New("not allowed in this state of the QP")
	// ErrDeviceRemoved: the device has gone; objects can only be closed.
	ErrDeviceRemoved = errors.New("device was removed")
	// ErrInvalidWR: a work request's fields do not fit together or exceed the QP's limits.
	ErrInvalidWR = errors.New("invalid work request")
	// ErrClosed: the object was closed.
	ErrClosed = net.ErrClosed
	// ErrUnreachable: the address names no device that can be reached.
	ErrUnreachable = errors.New("peer cannot be reached")
	// ErrAbsent: there is no device of the provider's kind, and nothing is broken. What wraps it says why.
	ErrAbsent = errors.New("no device is present")
)

// A Provider finds the devices of one kind.
type Provider interface {
	// Name is the provider's short name: "soft", "rxe", "mlx5".
	Name() string
	// Devices lists the devices that are present. An error means that the search itself failed, with the remedy in it, or,
	// if it matches ErrAbsent, why it was in vain.
	Devices() ([]Device, error)
}

// Tier orders providers for the automatic choice: lower is better.
type Tier uint8

const (
	TierHardware Tier = iota
	TierKernelSoft
	TierSoft
)

func (t Tier) String() string { return [...]string{"hardware", "kernel software", "software NIC"}[t] }

// DeviceInfo describes a device that has not been opened.
type DeviceInfo struct {
	Name     string // "mlx5_0", "rxe0", "soft0"
	Provider string
	Tier     Tier
	GUID     ib.GUID
	NetDevs  []string // net devices that its ports stand on
	// CharDevs are the paths of the character devices that a container needs to be given to use the device. Empty: none.
	CharDevs []string
}

// A Device can be opened.
type Device interface {
	Info() DeviceInfo
	// Open makes a context. Contexts of one device are independent.
	Open() (Context, error)
}

// Context is an open device.
type Context interface {
	QueryDevice() (ib.DeviceAttr, error)
	QueryPort(port uint8) (ib.PortAttr, error)
	// GIDs returns the used entries of a port's GID table, ordered by index.
	GIDs(port uint8) ([]ib.GIDEntry, error)
	AllocPD() (PD, error)
	CreateCompChannel() (CompChannel, error)
	CreateCQ(CQConfig) (CQ, error)
	// AsyncEvent waits for the next asynchronous event. It ends with ctx, and with net.ErrClosed on Close.
	AsyncEvent(ctx context.Context) (AsyncEvent, error)
	Close() error
}

// AsyncEvent is an asynchronous event with the object it concerns, as the provider made it; at most one is set.
type AsyncEvent struct {
	Type ib.EventType
	Port uint8
	QP   QP
	CQ   CQ
	SRQ  SRQ
}

// CQConfig describes a completion queue.
type CQConfig struct {
	Entries int         // at least
	Channel CompChannel // nil: polling only
}

// PD is a protection domain.
type PD interface {
	RegisterMR(MRConfig) (MR, error)
	CreateQP(QPConfig) (QP, error)
	CreateAH(ib.AHAttr) (AH, error)
	Close() error
}

// MRConfig describes a memory region.
type MRConfig struct {
	// Mem is the memory. It stays mapped, and does not move, until MR.Close has returned.
	Mem    []byte
	Access ib.Access
	// FD is a sealed memfd that Mem is a shared mapping of, starting at FDOffset, or -1 if the memory is private to the
	// process. The region may use the descriptor until MR.Close; it does not own it.
	FD       int
	FDOffset int64
}

// DMABufRegistrar is an optional part of PD: regions of memory that belongs to another device, such as a GPU.
type DMABufRegistrar interface {
	// RegisterDMABuf fails with errors.ErrUnsupported if the device or its driver cannot after all.
	RegisterDMABuf(DMABufConfig) (MR, error)
}

// DMABufConfig describes a region of a dma-buf.
type DMABufConfig struct {
	FD             int // the dma-buf; read during the call only
	Offset, Length uint64
	IOVA           uint64 // the region's address for the device and peers; equal to Offset modulo the page size
	Access         ib.Access
}

// MR is a registered memory region.
type MR interface {
	LKey() ib.LKey
	RKey() ib.RKey
	// Close withdraws the device's access: when it returns nil, neither the device nor a peer touches the memory any more.
	// ErrBusy: a memory window is bound to it.
	Close() error
}

// QPConfig describes a queue pair.
type QPConfig struct {
	Type   ib.QPType
	SendCQ CQ
	RecvCQ CQ
	SRQ    SRQ // nil: own receive queue
	Cap    ib.QPCap
	// SignalAll gives every send work request a completion, as if it had SendSignaled.
	SignalAll bool
	// Loopback has a RawPacket QP receive what QPs of its own context send, too.
	Loopback bool
}

// QP is a queue pair in state Reset.
type QP interface {
	QPN() ib.QPN
	// Cap is what was granted, each value at least what was asked for.
	Cap() ib.QPCap
	// Modify applies the attributes that mask names. The layer above has checked the transition against the state
	// table; the provider checks values (port, GID index, QPN), and the peer. It may block while a path is set up;
	// ctx bounds that.
	Modify(ctx context.Context, attr *ib.QPAttr, mask ib.QPAttrMask) error
	// Query returns the current attributes, State included.
	Query() (ib.QPAttr, error)
	// PostSend posts in order and rings once. It returns how many were accepted; if n < len(wrs), err says why wrs[n] was
	// not. In state Err, requests are accepted and flushed (IBA 10.3.1.7).
	PostSend(wrs []ib.SendWR) (n int, err error)
	// PostRecv likewise. ErrInvalidWR if the QP has an SRQ.
	PostRecv(wrs []ib.RecvWR) (n int, err error)
	// Close destroys the QP. Completions that were not polled yet may be lost; no buffer is touched afterwards.
	Close() error
}

// CQ is a completion queue.
type CQ interface {
	// Entries is the granted capacity.
	Entries() int
	// Poll moves up to len(wcs) completions into wcs. It returns a negative number once the queue has overrun or the
	// device is gone; Err then says why.
	Poll(wcs []ib.WC) int
	// Err is nil while the queue works.
	Err() error
	// Arm asks for one event on the channel at the next completion (or the next solicited or failed one). A completion
	// that is already in the queue raises none: poll once more after Arm.
	Arm(solicitedOnly bool) error
	Close() error
}

// CQResizer is an optional part of CQ.
type CQResizer interface {
	// Resize changes the capacity to at least entries, keeping what is queued. It fails if more than that is queued.
	Resize(entries int) error
}

// CQModerator is an optional part of CQ.
type CQModerator interface {
	// Moderate has the event of an armed queue wait until count completions have come, or period has passed since the first of them.
	// Of both, 0 is no such limit; with two of those, the event comes with the first completion, as ever.
	Moderate(count int, period time.Duration) error
}

// CompChannel delivers completion events.
type CompChannel interface {
	// Wait returns the next CQ that had been armed and has fired. It ends with ctx, and with net.ErrClosed on Close.
	Wait(ctx context.Context) (CQ, error)
	Close() error
}

// ThreadWaiter is an optional part of CompChannel.
type ThreadWaiter interface {
	// WaitThread is Wait that sleeps in a system call on the calling thread instead of the runtime's netpoller. It
	// returns nil and no error after Interrupt. One goroutine at a time, and not beside Wait. It does not allocate.
	WaitThread() (CQ, error)
	// Interrupt ends the WaitThread in progress or, if there is none, the next one. It never blocks.
	Interrupt()
}

// AH is an address handle.
type AH interface {
	Num() ib.AHNum
	Close() error
}

// SRQConfig describes a shared receive queue.
type SRQConfig struct {
	MaxWR  int
	MaxSGE int
}

// SRQCreator is an optional part of PD.
type SRQCreator interface {
	CreateSRQ(SRQConfig) (SRQ, error)
}

// SRQ is a shared receive queue.
type SRQ interface {
	MaxWR() int
	MaxSGE() int
	PostRecv(wrs []ib.RecvWR) (n int, err error)
	// SetLimit arms one EventSRQLimit for when fewer than n receives are posted; 0 disarms.
	SetLimit(n int) error
	Limit() int
	Close() error
}

// MWAllocator is an optional part of PD: type 2 memory windows.
type MWAllocator interface {
	AllocMW() (MW, error)
}

// MW is a type 2 memory window.
type MW interface {
	Handle() uint32
	// RKey is the window's current key; bind and invalidate change it.
	RKey() ib.RKey
	Close() error
}

// Steerer is an optional part of QP: flow rules, which say what a RawPacket QP receives.
type Steerer interface {
	// Steer makes a rule, which the layer above has checked. The QP cannot be closed before it.
	Steer(*ib.FlowRule) (Flow, error)
}

// Flow is a flow rule.
type Flow interface {
	// Close ends the rule: no frame that comes in afterwards is received by it.
	Close() error
}

// PathReporter is an optional part of QP: how a connected QP reaches its peer.
type PathReporter interface {
	// Path is a short name, such as "inproc", "shm", "udp", "tcp" or "roce"; empty before the QP is connected.
	Path() string
}

// StreamUser is an optional part of QP: an RC QP that can be connected by a TCP connection.
type StreamUser interface {
	// UseStream gives the QP, in Init, the connection that RTR will connect it by, whatever address RTR has. It takes c over; if it
	// fails, c stays as it was.
	UseStream(c *net.TCPConn) error
	// StreamErr is why the connection has ended; nil: it has not, or the QP has none.
	StreamErr() error
}

// ReachChecker is an optional part of Context: whether a peer's GID can be reached before queue pairs are made.
type ReachChecker interface {
	// CheckReach returns the path's name, or why the peer cannot be reached, matching ErrUnreachable. It may block; ctx
	// bounds that.
	CheckReach(ctx context.Context, gid ib.GID) (path string, err error)
}

// UDPPorter is an optional part of Context: devices whose GIDs do not all receive at the standard UDP port.
type UDPPorter interface {
	// UDPPort is where packets for a GID are received; it sees to it that they are.
	UDPPort(port uint8, index int) (uint16, error)
}

// PathProber is an optional part of Context: devices that can find out what passes between them and a peer of their kind.
type PathProber interface {
	// ProbePath finds the largest path MTU, up to most, of which packets pass both ways between this device and the queue pair qpn
	// of the peer's, in whatever state. The error matches ErrUnreachable if none do, and says what to do about it.
	ProbePath(ctx context.Context, to *ib.AHAttr, qpn ib.QPN, most ib.MTU) (ib.MTU, error)
}

// Remover is an optional part of Context: devices that can be taken away while they are open.
type Remover interface {
	// Gone returns a channel that is closed when the device is known to have gone.
	Gone() <-chan struct{}
}

// Progresser is an optional part of Context: providers whose data path needs CPU time of this process say how to give it.
type Progresser interface {
	// Progress lets the provider do pending work; it returns whether there was any. It never blocks.
	Progress() bool
}
