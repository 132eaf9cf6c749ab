package conformance

import (
	"fmt"
	"os"
	"slices"

	"github.com/ringside-rdma/ringside/verbs/ib"
)

// What the drivers of widely used devices do otherwise than the specification says. Everything that is not listed here
// must be as specified; the software NIC is not in any of these tables.

// saysInstead has, for each provider, completion statuses that it reports in place of those that are specified.
var saysInstead = map[string]map[ib.WCStatus][]ib.WCStatus{
	"rxe": {
		// A key, range or right that does not fit is no different to it from a request that makes no sense (finish_packet in
		// rxe_req.c, the errors of copy_data in rxe_resp.c).
		ib.WCLocalProtErr:   {ib.WCLocalQPOpErr},
		ib.WCLocalLengthErr: {ib.WCLocalQPOpErr},
		// A message that does not fit the receive is answered as an error of the receiver's own.
		ib.WCRemoteInvalidReqErr: {ib.WCRemoteOpErr},
	},
	"siw": {
		// Whatever is wrong with a request's own memory (siw_qp_sq_process in siw_qp_tx.c).
		ib.WCLocalProtErr: {ib.WCLocalQPOpErr},
		// A receive that cannot be written to (siw_rdmap_complete in siw_qp_rx.c).
		ib.WCLocalLengthErr: {ib.WCGeneralErr},
		ib.WCLocalQPOpErr:   {ib.WCGeneralErr},
	},
}

// instead reports whether the side's device is known to say got where want is specified.
func (s *Side) instead(want, got ib.WCStatus) bool {
	if got == ib.WCFlushErr && s.dev.Provider == "rxe" && !running.before(oneTask) { // see lostReason
		return want == ib.WCLocalProtErr || want == ib.WCLocalLengthErr || want == ib.WCLocalQPOpErr
	}
	says := func(s *Side) bool { return slices.Contains(saysInstead[s.dev.Provider][want], got) }
	remote := want == ib.WCRemoteInvalidReqErr || want == ib.WCRemoteAccessErr || want == ib.WCRemoteOpErr // the other side's word
	return says(s) || remote && (says(s.c.A) || says(s.c.B))
}

// A kernel is a version of Linux.
type kernel struct{ major, minor int }

var (
	never   kernel
	lastWQE = kernel{6, 12}
	oneTask = kernel{6, 12} // seen in it, and not in 6.1
	running = func() (k kernel) {
		b, _ := os.ReadFile("/proc/sys/kernel/osrelease")
		fmt.Sscanf(string(b), "%d.%d", &k.major, &k.minor)
		return k
	}()
)

// before reports whether version k has yet to see what version l has mended.
func (k kernel) before(l kernel) bool {
	return l == never || k.major < l.major || k.major == l.major && k.minor < l.minor
}

// A gap is a case that a provider is known to fail, and cannot be made to pass by this library. The case is not run.
type gap struct {
	provider, name, reason string
	since                  kernel // the first version that is known to do it wrong; zero: all
	mended                 kernel // the first version that is known to do it right; zero: none
	target                 bool   // only as the target (side B) of another provider's device
}

var gaps = []gap{
	{provider: "rxe", name: "mw/bounds", reason: "rxe holds peers to the bounds of the region, not of the window"},
	{provider: "rxe", name: "mw/send-with-invalidate-wrong-key",
		reason: "a SEND with invalidate of a window that is not bound crashes the kernel (rxe_invalidate_mw)"},
	{provider: "rxe", name: "placement/flush-depth-zero",
		reason: "a FLUSH for a QP without responder resources would crash the kernel, by its source (check_resource looks at READs, atomics and ATOMIC WRITEs only, rxe_prepare_res writes to none)"},
	{provider: "rxe", name: "placement/flush", reason: crcReason, target: true},
	{provider: "rxe", name: "placement/flush-rights", reason: crcReason, target: true},
	{provider: "rxe", name: "state/sqd-waits", reason: "rxe says that the send queue is drained while a request waits for a receive (RNR)"},
	{provider: "rxe", name: "srq/last-wqe-reached", reason: "rxe of this kernel does not raise this event", mended: lastWQE},
	{provider: "rxe", name: "revoke/window-under-writes",
		reason: "a packet that rxe is writing when a window is invalidated may be written after that is complete"},
	{provider: "rxe", name: "length/message-too-long", reason: lostReason, since: oneTask},
	{provider: "rxe", name: "state/sqe", reason: lostReason, since: oneTask},
	{provider: "rxe", name: "mw/bind-refused", reason: lostReason, since: oneTask},
	{provider: "rxe", name: "cq/error-is-solicited", since: oneTask,
		reason: "rxe of this kernel does not count the completion of a flushed receive as solicited (flush_recv_wqe)"},
}

// crcReason: between two of rxe's, who do it alike, nothing is noticed; and what rxe sends so, the software NIC takes (roce.ICRC).
const crcReason = "rxe drops FLUSHes whose invariant CRC is right: it has the packet in it twice (rxe_opcode does not say where the payload is)"

// lostReason is since sending and completing are one task, of which the former's error ends the latter's work.
const lostReason = "rxe of this kernel flushes a request that it cannot send, instead of saying why (rxe_completer)"

// What iWARP does otherwise, and siw, the only iWARP here.
const (
	byHand = "iWARP takes a QP to RTS by the connection manager only, and only once: there is no RESET afterwards, and no SQD"
	noRNR  = "iWARP has no RNR: a message without a receive ends the connection (siw_proc_send, DDP_ECODE_UT_INVALID_MSN_NOBUF)"
	noNAK  = "iWARP does not tell the sender which request was refused: it had completed when it was sent, and the connection ends"
	bothIn = "the error of one QP ends an iWARP connection, and so the other's work"
)

func init() {
	for reason, names := range map[string][]string{
		byHand: {"rc/self", "rc/path-mtu-of-each-size", "queue/granted", "flush/reset-clears", "flush/cycle", "flush/peer-not-connected",
			"flush/wrong-destination", "state/transitions", "state/attributes", "state/bad-values", "state/post-refused",
			"state/receive-in-init-and-rtr", "state/sqd", "state/sqd-waits", "kill/before-connect", "revoke/reset-under-writes",
			"reach/path-is-told"},
		noRNR: {"rnr/no-retries", "rnr/few-retries", "rnr/waits-for-receive", "rnr/keeps-order", "rnr/each-way", "flush/sends",
			"queue/send-full", "kill/while-a-send-waits", "srq/empty-is-rnr"},
		noNAK: {"length/receive-too-small", "length/receive-too-small-by-far", "flush/after-error", "local/receive-bad", "srq/bad-receive",
			"srq/other-domain", "order/read-depth-zero"},
		bothIn: {"flush/peer-in-err"},
		"siw does not look at a QP's rights, only at the region's (siw_check_mem; SIW_RDMA_WRITE_ENABLED is set and never read)": {
			"remote/qp-without-right", "state/access-changed-in-rts", "revoke/right-under-writes"},
		"siw checks a WRITE segment by segment, and what comes before the bad one is written (siw_proc_write)":                     {"remote/long-write-half-outside"},
		"siw's completions of receives do not count as solicited (siw_rqe_complete passes SIW_WQE_SIGNALLED), so all raise events": {"cq/solicited"},
		"siw does not raise this event": {"srq/last-wqe-reached"},
		"siw looks at a region, then writes to it: a segment that it is at is written after the region is withdrawn (siw_proc_write)": {
			"revoke/slice-region-under-writes"},
	} {
		for _, name := range names {
			gaps = append(gaps, gap{provider: "siw", name: name, reason: reason})
		}
	}
}

// tearsReads reports that a READ of a few bytes must not cross a page of the target's: siw answers it with bytes from elsewhere
// (siw_try_1seg in siw_qp_tx.c takes the part behind the boundary for the one before it).
func (c *C) tearsReads() bool { return c.A.dev.Provider == "siw" || c.B.dev.Provider == "siw" }

// losesResults reports that an atomic must not come behind a SEND or WRITE that has not completed: should rxe have to send both again, for
// want of a receive or because it did not hear of them in time, another rxe acknowledges both at once, and the atomic completes without
// its result (duplicate_request in rxe_resp.c, check_ack in rxe_comp.c).
func (c *C) losesResults() bool { return c.A.dev.Provider == "rxe" && c.B.dev.Provider == "rxe" }

// gapOf returns why a case is not run on a provider's devices, or an empty string; target: the device is that of another's.
func gapOf(provider, name string, target bool) string {
	for _, g := range gaps {
		if g.provider == provider && g.name == name && (target || !g.target) && running.before(g.mended) && (g.since == never || !running.before(g.since)) {
			return g.reason
		}
	}
	return ""
}

// saysLastWQE reports whether the side's device raises ib.EventLastWQEReached.
func (s *Side) saysLastWQE() bool {
	return s.dev.Provider != "siw" && (s.dev.Provider != "rxe" || !running.before(lastWQE))
}

// fencesStall reports that a READ or an atomic must not come behind a request with a fence: should rxe have to send that
// again, for want of a receive or because it did not hear of it in time, it fences it again, behind those that come after
// it, and so waits for ever (rxe_wqe_is_fenced).
func (s *Side) fencesStall() bool { return s.dev.Provider == "rxe" }
