// Behaviour of the ECP5 cells that nibblecore instantiates, for Verilator. Not for synthesis.

// Two half-cells of a carry chain. With INJECT1 "NO", each adds the carry to its table, and passes the carry on where the
// table is 1; elsewhere the table's lowest four entries, read with A and B, are the carry out.
module CCU2C (
    input  wire CIN,
    input  wire A0, B0, C0, D0,
    input  wire A1, B1, C1, D1,
    output wire S0, S1,
    output wire COUT
);
    parameter [15:0] INIT0 = 16'h0000;
    parameter [15:0] INIT1 = 16'h0000;
    parameter INJECT1_0 = "YES";
    parameter INJECT1_1 = "YES";

    localparam CARRY0 = INJECT1_0 == "NO";
    localparam CARRY1 = INJECT1_1 == "NO";

    wire table0 = INIT0[{D0, C0, B0, A0}];
    wire table1 = INIT1[{D1, C1, B1, A1}];
    wire carry1 = table0 ? CIN : (CARRY0 & INIT0[{2'b00, B0, A0}]);

    assign S0   = table0 ^ (CARRY0 & CIN);
    assign S1   = table1 ^ (CARRY1 & carry1);
    assign COUT = table1 ? carry1 : (CARRY1 & INIT1[{2'b00, B1, A1}]);
endmodule
