package conformance

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// TestSoftAndRXE runs the table between the kernel's rxe and the software NIC; both are each side once.
func TestSoftAndRXE(t *testing.T) {
	n := testutil.NewRXENet(t)
	for name, p := range map[string]path{
		"rxe to soft": {devices: [2]string{n.Device, "soft0"}},
		"soft to rxe": {devices: [2]string{"soft0", n.Device}, remoteIsA: true},
	} {
		p.name, p.twoProcesses, p.net, p.namespace = "udp", true, n.Soft, n.Namespace
		t.Run(name, func(t *testing.T) { runTable(t, p) })
	}
}
