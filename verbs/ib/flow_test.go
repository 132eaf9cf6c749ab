package ib

import "testing"

func TestFlowRuleCheck(t *testing.T) {
	eth, v4, v6, ports := &FlowFilter[FlowEth]{}, &FlowFilter[FlowIPv4]{}, &FlowFilter[FlowIPv6]{}, &FlowFilter[FlowPorts]{}
	for name, c := range map[string]struct {
		rule FlowRule
		ok   bool
	}{
		"everything":            {FlowRule{}, true},
		"three layers":          {FlowRule{Priority: 7, Eth: eth, IPv4: v4, UDP: ports}, true},
		"the rest":              {FlowRule{Kind: FlowDefault}, true},
		"filters of the rest":   {FlowRule{Kind: FlowDefault, UDP: ports}, false},
		"a priority of groups":  {FlowRule{Kind: FlowMulticast, Priority: 1}, false},
		"no kind":               {FlowRule{Kind: 4}, false},
		"IPv4 and IPv6":         {FlowRule{IPv4: v4, IPv6: v6}, false},
		"TCP and UDP":           {FlowRule{TCP: ports, UDP: ports}, false},
		"a flow label":          {FlowRule{IPv6: &FlowFilter[FlowIPv6]{Value: FlowIPv6{FlowLabel: 1<<20 - 1}}}, true},
		"a flow label too long": {FlowRule{IPv6: &FlowFilter[FlowIPv6]{Value: FlowIPv6{FlowLabel: 1 << 20}}}, false},
	} {
		if err := c.rule.Check(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFlowWords(t *testing.T) {
	for k, want := range map[FlowKind]string{FlowMatch: "match", FlowDefault: "default", FlowMulticast: "multicast", FlowSniffer: "sniffer", 9: "FlowKind(9)"} {
		if got := k.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	m := MAC{0x33, 0x33, 0, 0, 0, 0xfb}
	if m.String() != "33:33:00:00:00:fb" || !m.IsMulticast() || (MAC{2}).IsMulticast() {
		t.Error(m)
	}
}
