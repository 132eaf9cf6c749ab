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
}

// instead reports whether the side's device is known to say got where want is specified.
func (s *Side) instead(want, got ib.WCStatus) bool {
	return slices.Contains(saysInstead[s.dev.Provider][want], got)
}

// A kernel is a version of Linux.
type kernel struct{ major, minor int }

var (
	never   kernel
	lastWQE = kernel{6, 12}
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
	mended                 kernel // the first version that is known to do it right; zero: none
}

var gaps = []gap{
	{"rxe", "mw/bounds", "rxe holds peers to the bounds of the region, not of the window", never},
	{"rxe", "mw/send-with-invalidate-wrong-key", "a SEND with invalidate of a window that is not bound crashes the kernel (rxe_invalidate_mw)", never},
	{"rxe", "state/sqd-waits", "rxe says that the send queue is drained while a request waits for a receive (RNR)", never},
	{"rxe", "srq/last-wqe-reached", "rxe of this kernel does not raise this event", lastWQE},
	{"rxe", "revoke/window-under-writes", "a packet that rxe is writing when a window is invalidated may be written after that is complete", never},
}

// gapOf returns why a case is not run on a provider's devices, or an empty string.
func gapOf(provider, name string) string {
	for _, g := range gaps {
		if g.provider == provider && g.name == name && running.before(g.mended) {
			return g.reason
		}
	}
	return ""
}

// saysLastWQE reports whether the side's device raises ib.EventLastWQEReached.
func (s *Side) saysLastWQE() bool { return s.dev.Provider != "rxe" || !running.before(lastWQE) }

// fencesStall reports that requests with a fence must not meet a receive that is not posted yet: rxe fences them again
// when it sends them again, behind READs and atomics that come after them, and so waits for ever (rxe_wqe_is_fenced).
func (s *Side) fencesStall() bool { return s.dev.Provider == "rxe" }
