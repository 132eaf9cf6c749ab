package conformance

import (
	"testing"

	"github.com/ringside-rdma/ringside/internal/testutil"
)

// TestSoftAndRXE runs a part of the table between the kernel's rxe and the software NIC; both are each side once. PARTS=1, all of it.
func TestSoftAndRXE(t *testing.T) {
	n := testutil.NewRXENet(t)
	defer n.Sniff(t).Check()
	softAndRXE(t, n, path{}.share(t, 12))
}

// TestSoftAndRXE6 is TestSoftAndRXE over IPv6.
func TestSoftAndRXE6(t *testing.T) {
	n := testutil.NewRXENet(t)
	defer n.Sniff(t).Check()
	softAndRXE(t, n.OverIPv6(), path{}.share(t, 30))
}

// softAndRXE runs what there is of the table on the way p, on a network.
func softAndRXE(t *testing.T, n *testutil.RXENet, p path) {
	p.name, p.twoProcesses, p.net, p.kernelAddr, p.namespace = "udp", true, n.Soft, n.RXE, n.Namespace
	p.devices = [2]string{n.Device, "soft0"}
	t.Run("rxe to soft", func(t *testing.T) { runTable(t, p) })
	p.devices, p.remoteIsA = [2]string{"soft0", n.Device}, true
	t.Run("soft to rxe", func(t *testing.T) { runTable(t, p) })
}
